"A teacher that is the student's moving average, and one that averages its answers over versions of a batch"
import pytest,torch
from fastai.vision.all import *
from fastai.text.models.awdlstm import AWD_LSTM
from fastkd.all import *
from fastkd.averages import _copied,_version
from fastkd.test_utils import *
from copy import deepcopy
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

dls = digits_dls(64, bs=16)
teacher = digits_teacher(epochs=1, widths=(8,16,32))
KD = KnowledgeDistillation
def fit(learn, *cbs, n=1, lr=1e-2, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, cbs=list(cbs), **kw)
    return learn
def weights(m): return {k:v.clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
def close(a, b): torch.testing.assert_close(a.float(), b.float(), rtol=1e-5, atol=1e-6)
def kd(z, zt, T=5.): return T**2*(F.softmax(zt/T, 1)*(F.log_softmax(zt/T, 1)-F.log_softmax(z/T, 1))).sum(1).mean()

class Mean(Callback):
    "The average by hand, from the student as it is before the fit and after each step"
    order,run_valid = 100,False
    def __init__(self, d, ramp=False): self.d,self.ramp,self.k,self.mean,self.cancelled = d,ramp,0,None,False
    def after_cancel_step(self): self.cancelled = True
    def before_fit(self): self.mean = ifnone(self.mean, {k:v.double() if v.is_floating_point() else v for k,v in weights(self.learn.model).items()})
    def after_step(self):
        if self.cancelled: self.cancelled = False; return
        d = min(self.d, (1+self.k)/(10+self.k)) if self.ramp else self.d
        self.mean = {k:d*self.mean[k]+(1-d)*v.double() if v.is_floating_point() else v.clone() for k,v in self.learn.model.state_dict().items()}
        self.k += 1
def check(ema, hand):
    assert ema.k==hand.k>0
    for k,v in ema.model.state_dict().items(): close(v, hand.mean[k])

class TestEMA:
    @pytest.mark.parametrize('ramp', [False,True])
    def test_formula(self, ramp):
        "Weights and running statistics after each step, over two epochs and a second fit; counters are copied"
        ema,hand,learn = EMATeacher(.7, ramp=ramp),Mean(.7, ramp),digits_learner(dls)
        kd = KD(ema)
        fit(learn, kd, hand, n=2)
        check(ema, hand)
        assert hand.k==8 and ema.model.state_dict()['0.1.num_batches_tracked']==8
        fit(learn, kd, hand)
        check(ema, hand)
        assert hand.k==12

    def test_loss(self):
        "Each batch's loss is that of the average as it is then, in eval mode"
        ema,seen = EMATeacher(.5),[]
        class Spy(Callback):
            order,run_valid = 100,False
            def before_batch(self): self.mean,self.student = deepcopy(ema.model).eval(),deepcopy(self.learn.model)
            def after_loss(self): seen.append((self.x,self.y,self.mean,self.student,self.learn.loss_grad.detach()))
        fit(digits_learner(dls), KD(ema, alpha=.3, task_weight=1., T=2.), Spy())
        for x,y,mean,student,loss in seen:
            with torch.no_grad(): z,t = student(x),mean(x)
            close(loss.as_subclass(Tensor), F.cross_entropy(z, y)+.3*kd(z, t, 2.))
        assert seen[0][-1]!=seen[-1][-1]

    def test_real_steps_only(self):
        "Batches that only add to gradients do not move it, nor a step that fp16 skips"
        ema,hand = EMATeacher(.7),Mean(.7, True)
        fit(digits_learner(dls), KD(ema), GradientAccumulation(32), hand, n=2)
        check(ema, hand)
        assert hand.k==4
        class Skip(Callback):
            order = 10
            def before_step(self):
                if self.iter!=2: raise CancelStepException
        ema,hand = EMATeacher(.7),Mean(.7, True)
        fit(digits_learner(dls), KD(ema), Skip(), hand)
        check(ema, hand)
        assert hand.k==1

    def test_lr_find(self):
        ema = EMATeacher(.7)
        learn = digits_learner(dls, cbs=KD(ema))
        fit(learn)
        was = weights(ema.model)
        with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=20, show_plot=False, suggest_funcs=())
        learn.validate(),learn.get_preds()
        assert same(was, weights(ema.model)) and ema.k==4

    def test_a_module_of_its_own(self):
        ema,learn = EMATeacher(.7),digits_learner(dls)
        fit(learn, KD(ema))
        theirs = {o.data_ptr() for o in (*learn.model.parameters(),*learn.model.buffers())}
        assert not theirs&{o.data_ptr() for o in (*ema.model.parameters(),*ema.model.buffers())}
        assert not any(m.training for m in ema.model.modules()) and all(p.requires_grad and p.grad is None for p in ema.model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in ema.model.modules())
        # a teacher like any other, a model like any other
        fit(digits_learner(dls), KD(ema.model))
        learn.model.load_state_dict(ema.model.state_dict())
        acc = validate_teacher(ema, learn)
        assert learn.validate()==list(acc.values()) and list(acc)==['valid_loss','accuracy']
        fit(Learner(dls, ema.model, metrics=accuracy))

    def test_resume(self, tmp_path):
        "Two epochs in one go, or with all made anew in between"
        class Ordered(Callback):
            def before_train(self): self.learn.dl = self.dl.new(shuffle=False)
        def begin(): return digits_learner(dls, path=tmp_path, cbs=Ordered()),EMATeacher(.7)
        learn,ema = begin()
        fit(learn, KD(ema), n=2)
        a,e1 = begin()
        one = KD(e1)
        fit(a, one)
        a.save('student')
        one.save(tmp_path/'beside')
        b,e2 = begin()
        b.create_opt()
        two = KD(e2)
        two.load(tmp_path/'beside')
        b.load('student')
        fit(b, two)
        assert e2.k==ema.k==8
        for k,v in ema.model.state_dict().items(): close(v, e2.model.state_dict()[k])
        # into one that has begun, too
        e1.load_state_dict(ema.state_dict())
        assert same(weights(e1.model), weights(ema.model)) and e1.k==8
        # before anything has begun
        assert EMATeacher().load_state_dict(EMATeacher().state_dict()).k==0

    @pytest.mark.parametrize('bad', [{}, 3, dict(k=1, mean=[torch.zeros(3)])])
    def test_another_state(self, bad):
        ema = EMATeacher()
        fit(digits_learner(dls), KD(ema))
        with pytest.raises(ValueError): ema.load_state_dict(bad)

    def test_bf16(self):
        ema,hand,learn = EMATeacher(.7),Mean(.7, True),digits_learner(dls).to_bf16()
        fit(learn, KD(ema), hand)
        check(ema, hand)

    def test_half_weights(self):
        "The average of half weights is kept in full: a thousandth of a step would be lost"
        ema = EMATeacher(.999, ramp=False)
        learn = digits_learner(dls, splitter=params)
        learn.model.bfloat16()
        w = learn.model[-1].weight
        with torch.no_grad(): w.fill_(1.)
        class Half(Callback):
            order,run_valid = 1,False
            def after_pred(self): self.learn.pred = self.pred.float()
            def after_step(self): w.data.fill_(2.)
        half = Half()
        # asked before training with float images, which half weights cannot take
        learn.dls = digits_dls(64, bs=16, batch_tfms=Cast())
        fit(learn, KD(ema), half, n=5)
        m = ema.state_dict()['mean']
        want = 2-.999**20
        assert ema.model[-1].weight.dtype==torch.bfloat16 and abs(ema.model[-1].weight.float().mean().item()-want)<.01
        got = next(v for v in m if v.shape==w.shape)
        assert got.dtype==torch.float32 and abs(got.mean().item()-want)<1e-5
        # the student in full precision again
        learn.model.float()
        learn.opt,learn.dls = None,dls
        fit(learn, KD(ema))
        assert ema.model[-1].weight.dtype==torch.float32 and ema.k==24

    def test_interrupted(self):
        "It stays as it was when the fit was stopped, and the next one goes on"
        ema,hand,learn = EMATeacher(.7),Mean(.7, True),digits_learner(dls)
        class Stop(Callback):
            order = 200
            def after_step(self):
                if self.iter==2: raise KeyboardInterrupt
        kd = KD(ema)
        with pytest.raises(KeyboardInterrupt): fit(learn, kd, hand, Stop())
        check(ema, hand)
        assert hand.k==3
        fit(learn, kd, hand)
        check(ema, hand)

    def test_terms(self):
        "Layers of the average as hints"
        ema,got = EMATeacher(.5),[]
        class Spy(Callback):
            order,run_valid = 100,False
            def before_batch(self): self.o = deepcopy(self.learn.model),deepcopy(ema.model).eval(),self.x
            def after_loss(self):
                s,t,x = self.o
                with torch.no_grad(): got.append((self.learn.loss_grad.detach().as_subclass(Tensor),F.mse_loss(s[:2](x), t[:2](x))))
        fit(digits_learner(dls), KD(ema, alpha=0., task_weight=0., terms=Term('hint', '1', '1')), Spy())
        for a,b in got: close(a, b)
        assert len(got)==4

    def test_tied_and_frozen(self):
        m = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        m[3].weight = m[1].weight
        m[5].requires_grad_(False)
        ema,hand = EMATeacher(.7),Mean(.7, True)
        fit(Learner(dls, m, splitter=params), KD(ema), hand)
        check(ema, hand)
        assert ema.model[3].weight is ema.model[1].weight

    def test_recurrent(self):
        "A model that has run holds tensors that torch does not copy"
        m = AWD_LSTM(20, 8, 8, 2)
        m.train()
        x = torch.randint(0, 20, (4,5))
        m(x)
        with pytest.raises(RuntimeError): deepcopy(m)
        c = _copied(m)
        m.reset(),c.reset()
        close(m.eval()(x), c.eval()(x))

    def test_unet(self):
        "The hooks of a dynamic U-Net keep what its last training step computed"
        m = DynamicUnet(nn.Sequential(nn.Conv2d(1,4,3,padding=1), nn.ReLU(), nn.Conv2d(4,8,3,2,1), nn.ReLU()), 2, (8,8))
        m.train()
        x = torch.rand(2,1,8,8)
        m(x)
        with pytest.raises(RuntimeError): deepcopy(m)
        close(_copied(m).eval()(x), m.eval()(x))

    def test_refused(self, tmp_path):
        for bad,ex in ((teacher,TypeError), (True,TypeError), ('.9',TypeError), (1.,ValueError), (-.1,ValueError), (float('nan'),ValueError)):
            with pytest.raises(ex, match='`decay`'): EMATeacher(bad)
        with pytest.raises(TypeError): EMATeacher(.9, compile=True)
        ema = EMATeacher()
        with pytest.raises(ValueError, match='no model yet'): ema.model
        with pytest.raises(ValueError, match='no model yet'): precompute_targets(ema, dls, tmp_path/'a', bar=noop)
        with pytest.raises(ValueError, match='no part of an Ensemble'): KD([ema,teacher])
        with pytest.raises(ValueError, match='no part of an Ensemble'): TTATeacher(ema, lambda x: x.flip(-1))
        with pytest.raises(ValueError, match='leave `cache` out'): KD(ema, cache=tmp_path/'b')
        with pytest.raises(ValueError, match='leave one out'): KD(ema, teacher_weight=1.)
        learn = digits_learner(dls)
        fit(learn, KD(ema))
        with pytest.raises(ValueError, match='another student'): fit(digits_learner(dls), KD(ema))
        with pytest.raises(ValueError, match='another student'): precompute_targets(ema, dls, tmp_path/'c', bar=noop)
        learn.model[-1] = nn.Linear(16, 10, bias=False)
        learn.opt = None
        with pytest.raises(ValueError, match='make a new one'): fit(learn, KD(ema))

    def test_no_warning_and_export(self, tmp_path, recwarn):
        "An average of an untrained student is near chance, as it should be"
        learn = digits_learner(dls, path=tmp_path, cbs=KD(EMATeacher()))
        fit(learn)
        assert not [w for w in recwarn if 'near chance' in str(w.message)]
        learn.export('s.pkl')
        assert b'averages' not in (tmp_path/'s.pkl').read_bytes()

class Cast(Transform):
    "Images in half precision"
    def encodes(self, x:TensorImageBW): return x.bfloat16()

shift = lambda x: x.roll(1, 3)
up = lambda x: x.roll(-1, 2)
class Seen(Callback):
    order,run_valid = 100,False
    def before_batch(self): self.student = deepcopy(self.learn.model)
    def after_loss(self):
        if not hasattr(self, 'first'): self.first = self.x.as_subclass(Tensor),self.y,self.student,self.learn.loss_grad.detach().as_subclass(Tensor)

class TestTTA:
    @pytest.mark.parametrize('weights', [None,[2,1,1]])
    def test_classes(self, weights):
        "Loss of the first batch, by hand"
        seen = Seen()
        fit(digits_learner(dls), KD(TTATeacher(teacher, [shift,up], weights), alpha=.6, T=2.), seen)
        x,y,student,loss = seen.first
        w = [1/3]*3 if weights is None else [.5,.25,.25]
        with torch.no_grad():
            p = sum(a*teacher.model.eval()(o).softmax(1) for a,o in zip(w, (x,shift(x),up(x))))
            z = student(x)
        close(loss, .4*F.cross_entropy(z, y)+.6*kd(z, p.log(), 2.))

    @pytest.mark.parametrize('task', ['traits','center'])
    def test_other_tasks(self, task):
        d = digits_dls(64, bs=16, task=task)
        t,learn = digits_learner(d, (8,16,32)).model.eval(),digits_learner(d)
        x = d.valid.one_batch()[0].as_subclass(Tensor)
        tta = TTATeacher(t, shift).bind(learn, *(('binary',) if task=='traits' else ('regress',)))
        with torch.no_grad(): a,b = t(x),t(shift(x))
        close(tta(x), torch.logit((a.sigmoid()+b.sigmoid())/2) if task=='traits' else (a+b)/2)
        tta.release()

    def test_positions(self):
        d = digits_dls(64, bs=16, task='ink')
        t,learn = digits_learner(d, (8,8)),digits_learner(d)
        flip = lambda o: o.flip(-1)
        tta = TTATeacher(t, [(flip,flip)]).bind(learn, 'softmax', 1)
        x = d.valid.one_batch()[0].as_subclass(Tensor)
        with torch.no_grad(): a,b = t.model.eval()(x).softmax(1),flip(t.model(flip(x)).softmax(1))
        close(tta(x), ((a+b)/2).log())
        with pytest.raises(ValueError, match='a pair'): fit(learn, KD(TTATeacher(t, flip)))

    def test_vocab_and_list(self):
        "Classes are lined up by name, and several teachers are one"
        back = digits_dls(64, bs=16, vocab=[str(i) for i in reversed(range(10))])
        tta = TTATeacher([teacher,teacher], shift).bind(digits_learner(back))
        x = back.valid.one_batch()[0].as_subclass(Tensor)
        with torch.no_grad(): a,b = [teacher.model.eval()(o).softmax(1) for o in (x,shift(x))]
        close(tta(x), ((a+b)/2).log().flip(1))
        tta.release()

    def test_stored(self, tmp_path):
        "Precomputed answers are the live ones, and another set of versions is another teacher"
        tta = TTATeacher(teacher, [shift,up])
        store = precompute_targets(tta, dls, tmp_path/'s', dtype='float32', bar=noop)
        a,b = Seen(),Seen()
        fit(digits_learner(dls), KD(tta), a)
        fit(digits_learner(dls), KD(store), b)
        close(a.first[-1], b.first[-1])
        by = lambda n: lambda x: x.roll(n, 2)
        for o in ([up,up], [shift,by(1)], [shift], [shift,Rotate(p=1.)]):
            with pytest.raises(ValueError, match='teacher'): precompute_targets(TTATeacher(teacher, o), dls, tmp_path/'s', dtype='float32', bar=noop)
        with pytest.raises(ValueError): precompute_targets(teacher, dls, tmp_path/'s', dtype='float32', bar=noop)
        ids = [TTATeacher(teacher, o).ids for o in (by(1), by(2), by(1), Rotate(p=1., draw=5), Rotate(p=1., draw=6), Rotate(p=1., draw=5), [(shift,up)], partial(torch.roll, shifts=1), partial(torch.roll, shifts=2))]
        assert ids[0]==ids[2]!=ids[1] and ids[3]==ids[5]!=ids[4] and len({str(o) for o in ids})==7

    def test_transforms_of_fastai(self):
        f = Rotate(p=1., draw=90)
        tta = TTATeacher(teacher, f).bind(digits_learner(dls))
        x = dls.valid.one_batch()[0].as_subclass(Tensor)
        turned = f(TensorImage(x), split_idx=0).as_subclass(Tensor)
        assert not torch.equal(turned, x)
        with torch.no_grad(): a,b = [teacher.model.eval()(o).softmax(1) for o in (x,turned)]
        close(tta(x), ((a+b)/2).log())
        with pytest.raises(ValueError, match='images `'): _version(f, (x[:,0],))

    def test_refused(self):
        for bad in ([], [3], [(shift,)], [(shift,3)], 'flip', None):
            with pytest.raises((ValueError,TypeError)): TTATeacher(teacher, bad)
        with pytest.raises(ValueError, match='`weights`'): TTATeacher(teacher, shift, [1.])
        with pytest.raises(ValueError, match='leaves the inputs'): fit(digits_learner(dls), KD(TTATeacher(teacher, noop)))
        with pytest.raises(ValueError, match='one live teacher'): fit(digits_learner(dls), KD(TTATeacher(teacher, shift), terms=Term('hint', '1', '1')))

def test_validate_teacher():
    "As the teacher's own Learner says, with modes given back"
    learn = digits_learner(dls)
    teacher.model.train()
    got = validate_teacher(teacher, learn)
    assert all(m.training for m in teacher.model.modules()) and learn.opt is None
    t = Learner(dls, teacher.model, metrics=accuracy)
    with t.no_bar(): want = t.validate()
    assert list(got.values())==list(want)
    assert {k:round(v, 5) for k,v in validate_teacher([teacher,teacher], learn).items()}=={k:round(v, 5) for k,v in got.items()}
