"Methods of several stages: what each minimises, what it leaves alone, and that nothing of it stays"
import pytest,torch
from fastai.vision.all import *
from fastkd.all import *
from fastkd.schemes import *
from fastkd.on_teacher import _OnTeacher
from fastkd.test_utils import *
from copy import deepcopy
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

dls = digits_dls(32, bs=16)
teacher = digits_teacher(epochs=1, widths=(8,16,32))
x_val,y_val = [o.as_subclass(Tensor) for o in dls.valid.one_batch()]
three = ['0','1','2']
methods = dict(fitnet=partial(fit_fitnet, student_layer='1', teacher_layer='1'), fsp=partial(fit_fsp, student_layers=three, teacher_layers=three),
    ab=partial(fit_ab, student_layers=three, teacher_layers=three), ft=partial(fit_ft, student_layer='2', teacher_layer='2'), kta=partial(fit_kta, student_layer='2', teacher_layer='2'),
    pad=partial(fit_pad, student_layer='2', teacher_layer='2'), sskd=partial(fit_sskd, student_layer='2', teacher_layer='2'))
names = dict(fitnet=['hint','kd'], fsp=['fsp','labels'], ab=['ab','kd'], ft=['paraphraser','ft'], kta=['paraphraser','kta'], pad=['mse','pad'], sskd=['head','sskd'], simkd=['simkd'])
def call(nm, learn, cbs=None, n=1, lr=1e-2, t=None, **kw):
    t = ifnone(t, teacher)
    with learn.no_bar(), learn.no_logging():
        if nm=='simkd': return fit_simkd(learn, t, n, lr, cbs=cbs, **kw)
        return methods[nm](learn, t, n_epochs=n if isinstance(n, tuple) else (n,n), lr=lr, cbs=cbs, **kw)

def state(learn, t=teacher):
    "What a call must leave as it was"
    mods = [m for o in (learn,t) for m in o.model.modules()]
    return dict(hooks=[len(m._forward_hooks)+len(m._forward_pre_hooks) for m in mods], grads=[p.requires_grad for o in (learn,t) for p in o.model.parameters()],
        modes=[m.training for m in t.model.modules()], loss=id(learn.loss_func), metrics=[m.name for m in learn.metrics], cbs=[type(cb) for cb in learn.cbs])
def weights(m): return {k:v.clone() for k,v in m.state_dict().items()}
def same(a, b): return all(torch.equal(v, b[k]) for k,v in a.items())

class Spy(Callback):
    "The first batch of each stage: its inputs, copies of what it met, and its loss"
    order,run_valid = 100,False
    def __init__(self): self.seen = []
    def before_batch(self):
        if self.epoch or self.iter: return
        kd = first(cb for cb in self.learn.cbs if isinstance(cb, KnowledgeDistillation))
        ads = [] if kd is None else [a for a in kd.terms.adapters if a is not None]
        self.ads = ads
        self.seen.append(SimpleNamespace(x=self.x.as_subclass(Tensor).clone(), y=self.y.as_subclass(Tensor).clone(), model=deepcopy(self.learn.model), ads=deepcopy(ads), opt=self.learn.opt, lr=[]))
    def after_loss(self):
        if not (self.epoch or self.iter): self.seen[-1].loss = self.learn.loss_grad.detach().as_subclass(Tensor).clone()
    def after_step(self): self.seen[-1].lr.append(self.opt.hypers[-1]['lr'])
    def after_fit(self): self.seen[-1].end,self.seen[-1].end_ads = weights(self.learn.model),deepcopy(self.ads)

def feats(o, layers, t_layers=None, x=None):
    "Prediction and features of both on the batch that was seen, in the modes it was seen in"
    x = ifnone(x, o.x)
    with torch.no_grad(), Taps(o.model, layers) as a, Taps(teacher.model.eval(), ifnone(t_layers, layers)) as b:
        z,zt = o.model(x),teacher.model(x)
        return z,zt,a.take(),b.take()
def close(a, b): torch.testing.assert_close(a.float(), b.float(), rtol=1e-4, atol=1e-5)
def kd(z, zt, T): return T**2*(F.softmax(zt/T, 1)*(F.log_softmax(zt/T, 1)-F.log_softmax(z/T, 1))).sum(1).mean()
def ce(z, y): return F.cross_entropy(z, y)
def spied(nm, **kw):
    learn,spy = digits_learner(dls),Spy()
    return call(nm, learn, cbs=spy, **kw),spy.seen,learn

class TestValues:
    "The loss of the first batch of each stage, by hand"
    def test_fitnet(self):
        _,(a,b),_ = spied('fitnet')
        z,zt,(fs,),(ft,) = feats(a, '1')
        with torch.no_grad(): close(a.loss, (a.ads[0].student(fs)-ft).pow(2).mean())
        z,zt,*_ = feats(b, '1')
        close(b.loss, .2*ce(z, b.y)+.8*kd(z, zt, 3.))
        _,(_,b),_ = spied('fitnet', alpha=.6, T=2.)
        z,zt,*_ = feats(b, '1')
        close(b.loss, .4*ce(z, b.y)+.6*kd(z, zt, 2.))

    def test_fsp(self):
        _,(a,b),_ = spied('fsp')
        *_,fs,ft = feats(a, three)
        with torch.no_grad(): fs,ft = [list(o) for o in zip(*[ad(s, t) for ad,s,t in zip(a.ads[0], fs, ft)])]
        def flow(f, g):
            f = F.adaptive_max_pool2d(f, g.shape[2:])
            return torch.stack([sum(torch.outer(f[i,:,h,w], g[i,:,h,w]) for h in range(g.shape[2]) for w in range(g.shape[3]))/g[0,0].numel() for i in range(len(f))])
        close(a.loss, sum((flow(fs[i], fs[i+1])-flow(ft[i], ft[i+1])).pow(2).sum((1,2)).mean() for i in (0,1)))
        close(b.loss, ce(feats(b, '1')[0], b.y))

    def test_ab(self):
        _,(a,b),_ = spied('ab')
        ls = ['0.2:input','1.2:input','2.2:input']
        *_,fs,ft = feats(a, ls)
        want = 0.
        for i,(ad,s,t) in enumerate(zip(a.ads[0], fs, ft)):
            with torch.no_grad(): r = ad.student(s)
            want += 2.**(i-2)*(((r+1).pow(2)*((r>-1)&(t<=0))).sum()+((r-1).pow(2)*((r<=1)&(t>0))).sum())/len(r)
        close(a.loss, .003*want)
        z,zt,*_ = feats(b, ls)
        close(b.loss, .5*ce(z, b.y)+.5*kd(z, zt, 5.))

    @pytest.mark.parametrize('nm', ['ft','kta'])
    def test_paraphraser(self, nm):
        table,(o,),_ = spied(nm, **(dict(norm=.01) if nm=='kta' else {}))
        p = o.ads[0].teacher
        assert p.frozen and not any(q.requires_grad for q in p.parameters()) and not p.encoder.training
        z,zt,(fs,),(ft,) = feats(o, '2')
        with torch.no_grad(): s,t = o.ads[0].student(fs).flatten(1),p.encoder(ft).flatten(1)
        d = (s/s.norm(dim=1, keepdim=True)-t/t.norm(dim=1, keepdim=True)).abs().mean()
        with torch.no_grad():
            if nm=='ft': want = ce(z, o.y)+1000*d
            else:
                u,v = [F.normalize(f.flatten(2), dim=1) for f in (o.ads[0].student(fs),p.encoder(ft))]
                want = ce(z, o.y)+50*d+(u.mT@u-v.mT@v).pow(2).mean()
        close(o.loss, want)
        # the first stage's validation loss, of the paraphraser as it then is
        with torch.no_grad(), Taps(teacher.model.eval(), '2') as taps:
            teacher.model(x_val)
            f = taps.take()[0]
            want = (p.reconstruct(f)-f).pow(2).mean()+(.01*p.encoder(f).flatten(1).abs().sum(1).mean() if nm=='kta' else 0.)
        close(tensor(table.valid_loss[0]), want)

    def test_paraphraser_of_a_pooled_map(self):
        "The first stage sees the map that the second compares: pooled to the student's"
        table,(o,),_ = spied('ft', teacher_layer='1')
        with torch.no_grad(), Taps(teacher.model.eval(), '1') as taps:
            teacher.model(x_val)
            f = F.adaptive_avg_pool2d(taps.take()[0], 2)
            close(tensor(table.valid_loss[0]), (o.ads[0].teacher.reconstruct(f)-f).pow(2).mean())

    def test_pad(self):
        _,(a,b),_ = spied('pad')
        z,zt,(fs,),(ft,) = feats(a, '2')
        with torch.no_grad(): close(a.loss, ce(z, a.y)+15*(a.ads[0].student(fs.mean((2,3)))-ft.mean((2,3))).pow(2).mean())
        z,zt,(fs,),(ft,) = feats(b, '2')
        with torch.no_grad(): s,lv = b.ads[0].student(fs.mean((2,3)))
        close(b.loss, ce(z, b.y)+((ft.mean((2,3))-s).pow(2)/(1e-6+lv.exp())+lv).mean())
        # one linear layer for both stages, trained in both
        assert same(weights(a.end_ads[0].student), weights(b.ads[0].student[0])) and not same(weights(a.ads[0].student), weights(a.end_ads[0].student))
        assert not same(weights(b.end_ads[0].student[0]), weights(b.ads[0].student[0]))

    def test_sskd(self):
        table,(o,),_ = spied('sskd')
        assert len(o.x)==64 and torch.equal(o.y.view(-1,4), o.y[::4,None].expand(-1,4)) and torch.equal(o.x[1::4], o.x[::4].rot90(1, (2,3)))
        z,zt,(fs,),(ft,) = feats(o, '2')
        with torch.no_grad(): close(o.loss, sskd_loss((z,o.ads[0].student(fs.mean((2,3)))), (zt,o.ads[0].teacher(ft.mean((2,3)))), o.y[::4]))
        assert not any(p.requires_grad for p in o.ads[0].teacher.parameters())
        with torch.no_grad(), Taps(teacher.model.eval(), '2') as taps:
            teacher.model(rotate4(x_val))
            close(tensor(table.valid_loss[0]), aux_sskd_loss(o.ads[0].teacher(taps.take()[0].mean((2,3)))))

    def test_simkd(self):
        _,(o,),learn = spied('simkd')
        with torch.no_grad(), Taps(teacher.model.eval(), '2') as taps:
            teacher.model(o.x)
            close(o.loss, (o.model[1](o.model[0](o.x))-taps.take()[0]).pow(2).mean())
        assert same(weights(learn.model[2][2]), weights(teacher.model[5])) and learn.model[2][2] is not teacher.model[5]

class TestLeftAlone:
    @pytest.mark.parametrize('nm,trained', [('fitnet','01'), ('fsp','012'), ('ab','012')])
    def test_later_layers(self, nm, trained):
        "Beyond the last layer named nothing changes, statistics included; before it everything does"
        _,(a,b),_ = spied(nm)
        was = weights(a.model)
        assert {k:torch.equal(v, was[k]) for k,v in a.end.items()}=={k:k[0] not in trained for k in was}
        assert not any(torch.equal(v, a.end[k]) for k,v in b.end.items() if not k.endswith('num_batches_tracked'))
        assert b.opt is not a.opt and len(b.opt.all_params())==len(list(b.model.parameters()))

    @pytest.mark.parametrize('nm', names)
    def test_teacher_and_rest(self, nm):
        learn = digits_learner(dls)
        teacher.model.train()
        was,t = state(learn),weights(teacher.model)
        call(nm, learn)
        assert same(t, weights(teacher.model))
        now = state(learn)
        if nm=='simkd':
            assert [p.requires_grad for p in learn.model[2].parameters()]==[False]*2
            was,now = [{k:v for k,v in o.items() if k not in ('hooks','grads')} for o in (was,now)]
        assert now==was
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in learn.model.modules())

    @pytest.mark.parametrize('nm', ['ft','kta','sskd'])
    def test_frozen_part(self, nm):
        _,(o,),_ = spied(nm)
        assert same(weights(o.ads[0].teacher), weights(o.end_ads[0].teacher)) and not same(weights(o.ads[0].student), weights(o.end_ads[0].student))

class Boom(Callback):
    run_valid = False
    def __init__(self, stage, event, ex):
        self.n,self.stage,self.event,self.ex = -1,stage,event,ex
        setattr(self, event, self._go)
    def before_fit(self): self.n += 1
    def _go(self):
        if self.n==self.stage: raise self.ex('stop')

class TestErrors:
    @pytest.mark.parametrize('nm', names)
    @pytest.mark.parametrize('ex', [ZeroDivisionError,KeyboardInterrupt])
    @pytest.mark.parametrize('event', ['before_batch','after_loss','after_step'])
    def test_in_the_student_s_stages(self, nm, ex, event):
        for stage in range(sum(k not in ('paraphraser','head') for k in names[nm])):
            learn = digits_learner(dls)
            was,model,t = state(learn),learn.model,weights(teacher.model)
            with pytest.raises(ex): call(nm, learn, cbs=Boom(stage, event, ex))
            assert state(learn)==was and learn.model is model and same(t, weights(teacher.model))
            assert len({m.training for m in model.modules()})==1
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
        assert len(learn.opt.all_params())==len(list(model.parameters()))

    @pytest.mark.parametrize('nm', ['ft','kta','sskd'])
    @pytest.mark.parametrize('ex', [ZeroDivisionError,KeyboardInterrupt])
    def test_in_the_teacher_s_stage(self, nm, ex, monkeypatch):
        learn = digits_learner(dls)
        teacher.model.train()
        was,m = state(learn),weights(learn.model)
        def boom(self, *xb): raise ex('stop')
        monkeypatch.setattr(_OnTeacher, 'forward', boom)
        with pytest.raises(ex): call(nm, learn)
        assert state(learn)==was and same(m, weights(learn.model))

    def test_mixup_and_interrupt(self):
        learn = digits_learner(dls)
        lf = learn.loss_func
        with pytest.raises(KeyboardInterrupt): call('fsp', learn, cbs=[MixUp(),Boom(0, 'after_loss', KeyboardInterrupt)])
        assert learn.loss_func is lf

    def test_cancelled_stage(self):
        "A stage that is stopped early is followed by the next one"
        class Stop(Callback):
            order = 70
            def after_epoch(self): raise CancelFitException
        r = call('fitnet', digits_learner(dls), cbs=Stop(), n=3)
        assert r.stage.tolist()==['hint','kd']

bad = [('fitnet', dict(n=(1,2,3)), 'epochs of both stages'), ('fitnet', dict(n=(1,0)), 'at least 1'), ('fitnet', dict(n=(1,1.5)), 'at least 1'), ('fsp', dict(lr=(1e-3,)), '`lr` is'),
    ('fitnet', dict(student_layer='9'), 'the student has no layer'), ('ab', dict(teacher_layers=['0','1','9']), 'the teacher has no layer'), ('ab', dict(student_layers=['0']), 'one to one'),
    ('ab', dict(student_layers='1:output', teacher_layers='1:output'), 'no value below 0'), ('fsp', dict(student_layers=['1'], teacher_layers=['1']), 'at least two maps'),
    ('ft', dict(student_layer='5'), 'no adapter joins'), ('pad', dict(student_layer=['2'], teacher_layer=['2']), 'one layer with one'), ('ft', dict(k=.001), 'has none left'), ('kta', dict(weights=(1.,)), '`weights` is'), ('pad', dict(weights=(1.,2.,3.)), '`weights` is'),
    ('sskd', dict(cbs=MixUp()), 'mix_up mixes'), ('sskd', dict(cbs=CutMix), 'mixes'), ('fsp', dict(fit='fine_tune'), '`fit` must be'),
    *[(k, dict(t=[teacher,teacher]), 'one live teacher') for k in names], *[(k, dict(cbs=KnowledgeDistillation(teacher)), 'leave yours out') for k in names],
    ('simkd', dict(n=0), 'at least 1'), ('simkd', dict(student_body=9), 'has no head'), ('simkd', dict(teacher_head=0), 'has no head'), ('simkd', dict(student_body=3), None),
    ('simkd', dict(student_body=5), 'cut earlier'), ('simkd', dict(t=Teacher(teacher.model, vocab=list('9876543210'))), 'in one order')]
@pytest.mark.parametrize('nm,kw,msg', bad)
def test_refused(nm, kw, msg):
    "Before a step is taken, in whichever stage the mistake is"
    learn = digits_learner(dls)
    was,m = state(learn),weights(learn.model)
    if msg is None: return call(nm, learn, **kw)
    with pytest.raises(ValueError, match=msg): call(nm, learn, **kw)
    assert state(learn)==was and same(m, weights(learn.model))

def test_stored_teacher_is_refused(tmp_path):
    store = precompute_targets(teacher, dls, tmp_path/'store')
    with pytest.raises(ValueError, match='one live teacher'): call('pad', digits_learner(dls), t=store)

def test_frozen_student():
    learn = digits_learner(dls, splitter=lambda m: L(m[:2],m[2:]).map(params), train_bn=False)
    learn.freeze()
    for p in learn.model[:2].parameters(): p.requires_grad_(False)
    with pytest.raises(ValueError, match="all up to '1' is frozen"): call('fitnet', learn)
    assert [p.requires_grad for p in learn.model[:2].parameters()]==[False]*6 and all(p.requires_grad for p in learn.model[2:].parameters())

class TestTable:
    @pytest.mark.parametrize('nm', names)
    def test_stages(self, nm, capsys):
        learn = digits_learner(dls)
        rows = []
        with learn.no_bar():
            learn.logger = rows.append
            r = fit_simkd(learn, teacher, 2, 1e-2) if nm=='simkd' else methods[nm](learn, teacher, n_epochs=(2,1), lr=1e-2)
        want = names[nm][:1]*2+names[nm][1:]
        assert r.stage.tolist()==want and r.epoch.tolist()==([0,1] if nm=='simkd' else [0,1,0]) and list(r.columns[:4])==['stage','epoch','train_loss','valid_loss']
        # the progress table says it, too; loggers of numbers get one
        assert [str(o[3]) for o in rows]==want and all(isinstance(o[3], float) for o in rows)
        assert np.isfinite(r.train_loss).all() and np.isfinite(r.valid_loss).all()

    @pytest.mark.parametrize('nm', ['fitnet','ft','pad'])
    def test_lr(self, nm):
        "One learning rate per stage, or a slice"
        _,seen,_ = spied(nm, lr=(3e-3,slice(1e-4,2e-3)), fit='fit')
        assert [set(o.lr) for o in seen]==[{3e-3},{2e-3}][-len(seen):]

    def test_stages_of_one_s_own(self):
        learn,seen = digits_learner(dls),[]
        class Which(Callback):
            def before_train(self): seen.append(self.n_epoch)
        with learn.no_bar(), learn.no_logging(): r = fit_stages(learn, [teacher,teacher.model], [Stage('a', 1, 1e-3), Stage('b', 2, 1e-3, cbs=Which(), T=2.)], fit='fit_flat_cos')
        assert seen==[2,2] and r.stage.tolist()==['a','b','b'] and r.kd_loss.notna().tolist()==[False,True,True]

    def test_last_stage_is_checked_first(self):
        learn = digits_learner(dls)
        m = weights(learn.model)
        for last in (Stage('b', 1, upto='9'), Stage('b', 1, terms=Term('at', '9', '1')), Stage('b', 1, terms=Term('at', '1', '9')), Stage('b', 1, alpha=2.)):
            with pytest.raises(ValueError): fit_stages(learn, teacher, [Stage('a', 1),last])
        assert same(m, weights(learn.model))

    def test_modules_as_layers(self):
        learn = digits_learner(dls)
        assert len(call('ab', learn, student_layers=learn.model[1], teacher_layers=teacher.model[1]))==2
        assert len(call('fitnet', learn, student_layer=learn.model[1], teacher_layer=teacher.model[1]))==2

    def test_export(self, tmp_path):
        learn = digits_learner(dls, path=tmp_path)
        r = call('fsp', learn)
        learn.export('s.pkl')
        assert b'fastkd.' not in (tmp_path/'s.pkl').read_bytes().replace(b'fastkd.test_utils', b'') and r.accuracy.notna().all()

class TestPrecision:
    @pytest.mark.parametrize('nm', names)
    def test_bf16(self, nm):
        learn = digits_learner(dls).to_bf16()
        r = call(nm, learn)
        assert np.isfinite(r.train_loss).all() and all(torch.isfinite(p).all() for p in learn.model.parameters())
    def test_mixup(self):
        for nm in ('fitnet','ab','pad'): assert np.isfinite(call(nm, digits_learner(dls), cbs=MixUp()).train_loss).all()

class TestSSKD:
    def test_not_square(self):
        class Crop(Transform):
            def encodes(self, x:TensorImageBW): return x[...,:6]
        wide,m = digits_dls(32, bs=16, batch_tfms=Crop()),tiny_cnn((8,16,32))
        learn = Learner(wide, tiny_cnn(), metrics=accuracy)
        with pytest.raises(ValueError, match='square images'): call('sskd', learn, t=m)
    def test_single_image(self):
        with pytest.raises(ValueError, match='a single image'): call('sskd', digits_learner(digits_dls(33, bs=16)))
    def test_term_needs_rotations(self):
        head = lambda c: nn.Linear(c, 8)
        term = lambda: Term('sskd', '2', '2', adapter=Adapter(head(16), head(32), before=(GlobalPool(),GlobalPool())))
        learn = digits_learner(dls)
        with learn.no_bar(), learn.no_logging():
            with pytest.raises(ValueError, match='Rotations'): learn.fit(1, cbs=KnowledgeDistillation(teacher, terms=term()))
            learn.fit(1, cbs=[KnowledgeDistillation(teacher, terms=term(), alpha=0.), Rotations()])
            with pytest.raises(ValueError, match='mixes'): learn.fit(1, cbs=[Rotations(),MixUp()])
        assert np.isfinite(learn.recorder.losses).all()
    def test_one_validation_image(self):
        "The loss of an image without others is 0"
        d = digits_dls(32, bs=16)
        d.valid.bs = 598
        r = call('sskd', digits_learner(d))
        assert np.isfinite(r.valid_loss).all()

class TestSimKD:
    def test_as_the_teacher(self):
        "With the teacher's body and no projector the head says what it always says"
        twin = digits_learner(dls)
        twin.model = deepcopy(teacher.model)
        m = simkd_model(twin, teacher, projector=nn.Identity()).eval()
        with torch.no_grad(): assert torch.equal(m(x_val), teacher.model.eval()(x_val))

    def test_body_and_head(self):
        "fastai's two-part models are cut by themselves, others by the parts that are named"
        def two(widths):
            m = tiny_cnn(widths)
            return nn.Sequential(m[:3], nn.Sequential(AdaptiveConcatPool2d(), nn.Flatten(), nn.BatchNorm1d(2*widths[-1]), nn.Dropout(.5), nn.Linear(2*widths[-1], 10)))
        t = two((8,16,32))
        learn = Learner(dls, two((4,8,16)), metrics=accuracy, splitter=lambda m: L(m[0][:2],m[0][2:],m[1:]).map(params))
        was = weights(t)
        body = learn.model[0]
        call('simkd', learn, t=t)
        # its batch norm keeps the teacher's statistics
        assert learn.model[0] is body and same(was, weights(t)) and same(weights(learn.model[2]), weights(t[1])) and len(learn.opt.param_lists)==3
        class Net(nn.Module):
            def __init__(self, w): super().__init__(); m = tiny_cnn(w); self.features,self.fc = m[:3],m[3:]
            def forward(self, x): return self.fc(self.features(x))
        t,learn = Net((8,16,32)),Learner(dls, Net((4,8,16)), metrics=accuracy)
        with pytest.raises(ValueError, match='no nn.Sequential'): call('simkd', learn, t=t)
        call('simkd', learn, t=t, student_body=learn.model.features, teacher_head=t.fc)
        assert same(weights(learn.model[2]), weights(t.fc))

    @pytest.mark.parametrize('k_student,k_teacher', [(2,3), (3,2)])
    def test_sizes(self, k_student, k_teacher):
        "The larger map is pooled to the smaller one"
        def net(w, k): m = tiny_cnn(w[:k]); return nn.Sequential(*m)
        t,learn,spy = net((8,16,32), k_teacher),Learner(dls, net((4,8,16), k_student), metrics=accuracy),Spy()
        call('simkd', learn, cbs=spy, t=t)
        o = spy.seen[0]
        with torch.no_grad():
            fs,ft = o.model[1](o.model[0](o.x)),t.eval()[:k_teacher](o.x)
            assert fs.shape[2:]==(2,2)
            close(o.loss, (fs-F.adaptive_avg_pool2d(ft, 2)).pow(2).mean())

    def test_plain_module(self, tmp_path):
        learn = digits_learner(dls)
        call('simkd', learn)
        torch.save(learn.model, tmp_path/'m.pt')
        assert b'fastkd' not in (tmp_path/'m.pt').read_bytes()
        assert learn.validate()[1]>=0 and len(learn.predict(dls.valid_ds[0][0])[2])==10
