"Students that teach each other: what each minimises and when the others answer, and that each Learner keeps its own ways"
import pytest,torch
from fastai.vision.all import *
from fastkd.all import *
from fastkd.test_utils import *
from contextlib import ExitStack
from copy import deepcopy
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

dls = digits_dls(48, bs=16)
def student(i=0, widths=(4,8), d=dls, **kw): return digits_learner(d, widths, seed=i, **kw)
def mutual(learns, n=1, lr=1e-2, seed=0, **kw):
    learns[0].dls.train.rng = random.Random(seed)
    with ExitStack() as s:
        for l in learns: s.enter_context(l.no_bar()),s.enter_context(l.no_logging())
        return mutual_learning(learns, n, lr, **kw)
def weights(m): return {k:v.clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
def close(a, b): torch.testing.assert_close(a.as_subclass(Tensor).float(), b.as_subclass(Tensor).float(), rtol=1e-4, atol=1e-6)
def kl(z, zt, T=1.): return T**2*(F.softmax(zt/T, 1)*(F.log_softmax(zt/T, 1)-F.log_softmax(z/T, 1))).sum(1).mean()

class Spy(Callback):
    "All models as one of them meets a batch, and its loss"
    order,run_valid = 100,False
    def __init__(self, models, seen): self.models,self.seen = models,seen
    def before_batch(self): self.now = deepcopy(self.models)
    def after_loss(self): self.seen.append((self.epoch,self.iter,self.learn.model,self.now,self.learn.xb[0].as_subclass(Tensor),self.learn.yb,self.learn.loss_grad.detach()))
def spied(learns, **kw):
    seen,models = [],[l.model for l in learns]
    for l in learns: l.add_cb(Spy(models, seen))
    table = mutual(learns, **kw)
    return seen,models,table

class TestValues:
    @pytest.mark.parametrize('n', [2,3])
    def test_loss(self, n):
        "Every batch of every student, by hand: the others answer in eval mode, those before it after their step"
        learns = [student(i, w) for i,w in zip(range(n), ((4,8),(8,16),(4,4,4)))]
        seen,models,_ = spied(learns)
        assert len(seen)==3*n and [models.index(o[2]) for o in seen]==list(range(n))*3
        # the turn of the second comes after the step of the first, who has not changed it by asking
        assert not same(seen[0][3][0].state_dict(), seen[1][3][0].state_dict()) and same(seen[0][3][1].state_dict(), seen[1][3][1].state_dict())
        for i,(_,_,m,now,x,(y,),loss) in enumerate(seen):
            me = i%n
            with torch.no_grad():
                z = now[me](x)
                others = [o.eval()(x) for j,o in enumerate(now) if j!=me]
                close(loss, F.cross_entropy(z, y)+sum(kl(z, t) for t in others)/(n-1))
        # one batch for all
        assert all(torch.equal(seen[i][4], seen[i-i%n][4]) for i in range(3*n))

    def test_weights_and_temperature(self):
        learns = [student(i) for i in range(2)]
        seen,models,table = spied(learns, T=3., alpha=.25)
        for i,(_,_,m,now,x,(y,),loss) in enumerate(seen):
            with torch.no_grad(): z,t = now[i%2](x),now[1-i%2].eval()(x)
            close(loss, F.cross_entropy(z, y)+.25*kl(z, t, 3.))
        learns = [student(i) for i in range(2)]
        seen,*_,table = spied(learns, n=2, T=SchedLin(4.,1.), alpha=SchedLin(0.,1.), fit='fit')
        (_,_,m,now,x,(y,),loss),pos = seen[-1],5/6
        with torch.no_grad(): z,t = now[1](x),now[0].eval()(x)
        close(loss, F.cross_entropy(z, y)+pos*kl(z, t, 4-3*pos))
        assert {'kd_alpha','kd_T'}<=set(table)

    def test_start(self):
        seen,*_ = spied([student(i) for i in range(2)], n=2, start=1)
        for e,_,m,now,x,(y,),loss in seen:
            i = seen[0][2] is not m
            with torch.no_grad(): z,t = now[i](x),now[1-i].eval()(x)
            close(loss, F.cross_entropy(z, y)+(kl(z, t) if e else 0))

    @pytest.mark.parametrize('task', ['traits','center','ink'])
    def test_other_tasks(self, task):
        d = digits_dls(32, bs=16, task=task)
        seen,*_ = spied([student(i, d=d) for i in range(2)])
        for i,(_,_,m,now,x,(y,),loss) in enumerate(seen):
            with torch.no_grad(): z,t = now[i%2](x),now[1-i%2].eval()(x)
            y,p,q = y.as_subclass(Tensor),t.sigmoid(),z.sigmoid()
            if task=='traits': want = F.binary_cross_entropy_with_logits(z, y)+(p*(p/q).log()+(1-p)*((1-p)/(1-q)).log()).mean()
            elif task=='center': want = F.mse_loss(z, y)+F.mse_loss(z, t)
            else: want = F.cross_entropy(z, y)+kl(z, t)
            close(loss, want)

    def test_another_loss(self):
        seen,*_ = spied([student(i) for i in range(2)], loss=DKDLoss(T=2.))
        _,_,m,now,x,(y,),loss = seen[1]
        with torch.no_grad(): close(loss, F.cross_entropy(now[1](x), y)+dkd_loss(now[1](x), now[0].eval()(x), y, T=2.))
    def test_loss_module(self):
        z,ts = torch.randn(4,5),[torch.randn(4,5) for _ in range(3)]
        close(MutualLoss('mse_logits')(z, ts), sum(F.mse_loss(z, t) for t in ts)/3)
        assert MutualLoss(NKDLoss()).needs==('targ',) and MutualLoss(KDLoss(T=3.)).scale==9
        with pytest.raises(TypeError): MutualLoss(lambda a,b: 0)

class TestEachItsOwn:
    @pytest.mark.parametrize('fit', ['fit_one_cycle','fit_flat_cos','fit'])
    def test_alone(self, fit):
        "With `alpha=0` each ends where it ends alone: optimizer, schedule and callbacks are its own"
        def make(): return [student(0), student(1, (8,4), opt_func=SGD, wd=.1, cbs=GradientClip(.1)), student(2, opt_func=partial(OptimWrapper, opt=torch.optim.AdamW), cbs=GradientAccumulation(32))]
        lrs,a,b = [1e-2,.1,slice(1e-4,3e-3)],make(),make()
        table = mutual(a, 2, lrs, alpha=0., fit=fit)
        for l,m,lr,o in zip(a, b, lrs, ('student 1','student 2','student 3')):
            m.dls.train.rng = random.Random(0)
            with m.no_bar(), m.no_logging(): getattr(m, fit)(2, lr)
            assert same(l.model.state_dict(), m.model.state_dict())
            assert l.recorder.lrs==m.recorder.lrs and l.recorder.losses==m.recorder.losses
            rows = table[table.stage==o]
            assert rows.accuracy.tolist()==fit_table(m).accuracy.tolist() and rows.valid_loss.tolist()==fit_table(m).valid_loss.tolist()

    def test_asking_changes_nothing(self):
        "One forward pass in training mode per batch, as batch norm counts them"
        learns = [student(i) for i in range(3)]
        mutual(learns)
        assert [l.model[0][1].num_batches_tracked.item() for l in learns]==[3]*3
        assert not any(m._forward_hooks for l in learns for m in l.model.modules()) and not any(l.model.training for l in learns)

    def test_second_fit_and_use(self, tmp_path):
        learns = [student(i, path=tmp_path) for i in range(2)]
        mutual(learns)
        assert len(mutual(learns, 2, loss='nkd'))==4
        for i,l in enumerate(learns):
            assert len(l.predict(dls.valid_ds[0][0])[2])==10
            l.export(f'{i}.pkl')
            assert b'fastkd.mutual' not in (tmp_path/f'{i}.pkl').read_bytes()
            with l.no_bar(), l.no_logging(): l.fit(1, 1e-3)
        # they are a teacher together
        fourth = student(3)
        with fourth.no_bar(), fourth.no_logging(): fourth.fit(1, cbs=KnowledgeDistillation(learns))

    def test_export_inside(self, tmp_path):
        class Save(Callback):
            order = 70
            def after_epoch(self): self.learn.save('now'),self.learn.export(tmp_path/'now.pkl')
        mutual([student(0, path=tmp_path, cbs=Save()),student(1)])
        assert b'fastkd.mutual' not in (tmp_path/'now.pkl').read_bytes()

    def test_bf16_and_mixup(self):
        a,b = student(0).to_bf16(),student(1, cbs=MixUp())
        lf = b.loss_func
        table = mutual([a,b])
        assert np.isfinite(table.train_loss).all() and b.loss_func is lf

    def test_mixup_value(self):
        "The others are asked about the mixed images"
        a,b = student(0, cbs=MixUp()),student(1)
        seen,models,_ = spied([a,b])
        _,_,m,now,x,(y,),loss = seen[1]
        assert not torch.equal(seen[0][4], x)
        with torch.no_grad(): close(loss, F.cross_entropy(now[1](x), y)+kl(now[1](x), now[0].eval()(x)))

class TestTable:
    def test_rows(self):
        "Rows of all in the first one's table, under its columns"
        rows,a,b = [],student(0),student(1, metrics=[error_rate,accuracy])
        a.logger = rows.append
        with a.no_bar():
            table = mutual_learning([a,b], 2, 1e-2)
        assert [str(o[3]) for o in rows]==['student 1','student 2']*2 and all(len(o)==len(a.recorder.metric_names) for o in rows)
        i = list(a.recorder.metric_names).index('accuracy')
        assert [o[i] for o in rows[1::2]]==table[table.stage=='student 2'].accuracy.tolist()
        assert table.stage.tolist()==['student 1']*2+['student 2']*2 and table.epoch.tolist()==[0,1,0,1] and table.error_rate.notna().tolist()==[False]*2+[True]*2
    def test_progress(self, capsys):
        learns = [student(i) for i in range(2)]
        mutual_learning(learns, 1)
        out = capsys.readouterr().out
        assert out.count('train_loss')==1 and out.count('student 1')==1 and out.count('student 2')==1
    def test_quiet(self, capsys):
        a,b = [student(i) for i in range(2)]
        with a.no_bar(), a.no_logging(): mutual_learning([a,b], 1)
        assert not capsys.readouterr().out

def state(learns): return [dict(cbs=[type(cb) for cb in l.cbs], metrics=[m.name for m in l.metrics], loss=id(l.loss_func), logger=l.logger, attrs=sorted(set(vars(l))&{'_do_fit'}), hooks=sum(len(m._forward_hooks) for m in l.model.modules())) for l in learns]
class Boom(Callback):
    order = 70
    def __init__(self, event, ex): self.event,self.ex = event,ex
    def __call__(self, event_name):
        if event_name==self.event and (event_name!='after_loss' or self.learn.training): raise self.ex('stop')

class TestStopped:
    @pytest.mark.parametrize('who', [0,1])
    @pytest.mark.parametrize('event', ['before_fit','before_train','after_loss','after_step','after_epoch','after_fit'])
    @pytest.mark.parametrize('ex', [ZeroDivisionError,KeyboardInterrupt])
    def test_nothing_stays(self, who, event, ex):
        learns = [student(i) for i in range(2)]
        was,boom = state(learns),Boom(event, ex)
        learns[who].add_cb(boom)
        with pytest.raises(ex): mutual(learns)
        learns[who].remove_cb(boom)
        assert state(learns)==was
        mutual(learns)

    @pytest.mark.parametrize('who', [0,1])
    @pytest.mark.parametrize('event,ex', [('after_epoch',CancelFitException), ('after_loss',CancelFitException), ('after_loss',CancelEpochException), ('after_loss',CancelTrainException)])
    def test_cancelled(self, who, event, ex):
        "What stops one stops all"
        learns,boom = [student(i) for i in range(2)],Boom(event, ex)
        was = state(learns)
        learns[who].add_cb(boom)
        mutual(learns, 3)
        learns[who].remove_cb(boom)
        assert state(learns)==was
        mutual(learns)

    @pytest.mark.parametrize('who', [0,1])
    def test_skipped_batch(self, who):
        learns = [student(i) for i in range(2)]
        learns[who].add_cb(Boom('after_loss', CancelBatchException))
        was = [weights(l.model[-1]) for l in learns]
        mutual(learns)
        assert [same(w, l.model[-1].state_dict()) for w,l in zip(was, learns)]==[who==0,who==1]

    def test_early_stopping(self):
        learns = [student(0),student(1, cbs=EarlyStoppingCallback(monitor='accuracy', min_delta=2., patience=1))]
        assert (mutual(learns, 5).groupby('stage').size()<=2).all()

def test_refused():
    a,b = student(0),student(1)
    was = weights(a.model)
    for bad in ([], [a], [a,b.model], a, None):
        with pytest.raises((TypeError,ValueError)): mutual_learning(bad, 1)
    kd = KnowledgeDistillation(b.model)
    for kw,msg in ((dict(n=0),'`n_epoch`'), (dict(n=1.5),'`n_epoch`'), (dict(lr=[1e-2]),'one for each'), (dict(fit='fine_tune'),'`fit` must be'), (dict(alpha=2.),'alpha'), (dict(T=-1.),'`T`'), (dict(loss='kdd'),'no loss is called')):
        with pytest.raises(ValueError, match=msg): mutual([a,b], **kw)
    for other,msg in ((student(1, d=digits_dls(48, bs=16)),'same DataLoaders'), (a,'share weights'), (Learner(dls, a.model),'share weights'), (student(1, cbs=kd),'leave yours out')):
        with pytest.raises(ValueError, match=msg): mutual([a,other])
    assert same(was, a.model.state_dict()) and state([a])[0]['attrs']==[]
