"Chains, generations, snapshots and early stopping: who teaches whom at each step, by hand"
import pytest,torch
from fastai.vision.all import *
from fastkd.all import *
from fastkd.test_utils import *
from contextlib import ExitStack
from copy import deepcopy
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

dls = digits_dls(32, bs=16)
teacher = digits_teacher(epochs=1, widths=(8,16,32))
def student(i=0, widths=(4,8), d=dls, **kw):
    learn = digits_learner(d, widths, seed=i, **kw)
    learn.remove_cb(ProgressCallback)
    learn.logger = noop
    return learn
def weights(m): return {k:v.clone() for k,v in m.state_dict().items()}
def same(a, b): return a.keys()==b.keys() and all(torch.equal(v, b[k]) for k,v in a.items())
def close(a, b): torch.testing.assert_close(a.as_subclass(Tensor).float(), b.as_subclass(Tensor).float(), rtol=1e-4, atol=1e-6)
def kd(z, zt, T=5.): return T**2*(F.softmax(zt/T, 1)*(F.log_softmax(zt/T, 1)-F.log_softmax(z/T, 1))).sum(1).mean()
def ce(z, y): return F.cross_entropy(z, y.as_subclass(Tensor))

class Spy(Callback):
    "Every batch of every fit: Learner, epoch, its model before, its input, label and loss"
    order,run_valid = 100,False
    def __init__(self): self.seen = []
    def before_batch(self): self.now = deepcopy(self.learn.model)
    def after_loss(self): self.seen.append((self.learn.model,self.epoch,self.now,self.learn.xb[0].as_subclass(Tensor),self.learn.yb[0],self.learn.loss_grad.detach(),self.learn.opt))
def answers(now, t, x):
    with torch.no_grad(): return now(x),deepcopy(t).eval()(x)

class TestChain:
    def test_loss(self):
        "Each is taught by the one before it, as that one is at the end of its fit"
        a,b,c = student(0, (8,16)),student(1, (4,8)),student(2, (4,4))
        spy = Spy()
        table = fit_chain([a,b,c], teacher, 2, 1e-2, T=2., alpha=.7, cbs=spy)
        assert len(spy.seen)==12
        who = {id(l.model):t for l,t in ((a,teacher.model),(b,a.model),(c,b.model))}
        for m,_,now,x,y,loss,_ in spy.seen:
            z,t = answers(now, who[id(m)], x)
            close(loss, .3*ce(z, y)+.7*kd(z, t, 2.))
        assert [o[0] for o in spy.seen]==[a.model]*4+[b.model]*4+[c.model]*4
        assert table.stage.tolist()==['assistant 1']*2+['assistant 2']*2+['student']*2 and table.epoch.tolist()==[0,1]*3

    def test_one_each(self):
        "Epochs, rates and names; a new optimizer for each fit, and one callback for all"
        a,b = student(0),student(1)
        spy = Spy()
        table = fit_chain(L(a,b), [teacher,teacher], [1,2], [1e-3,2e-3], names=['a','b'], fit='fit', cbs=spy)
        assert table.stage.tolist()==['a','b','b'] and set(a.recorder.lrs)=={1e-3} and set(b.recorder.lrs)=={2e-3}
        z,t = answers(*[spy.seen[0][i] for i in (2,)], teacher.model, spy.seen[0][3])
        close(spy.seen[0][5], .5*ce(z, spy.seen[0][4])+.5*kd(z, t))
        assert fit_chain([a], teacher, 1).stage.tolist()==['student']

    def test_store_and_other_data(self, tmp_path):
        "The first may learn from a store; classes of another order are lined up by name"
        store = precompute_targets(teacher, dls, tmp_path/'s', bar=noop)
        back = digits_dls(32, bs=16, vocab=[str(i) for i in reversed(range(10))])
        a,b,spy = student(0),student(1, d=back),Spy()
        fit_chain([a,b], store, 1, 1e-2, cbs=spy)
        m,_,now,x,y,loss,_ = spy.seen[-1]
        z,t = answers(now, a.model, x)
        assert m is b.model
        close(loss, .5*ce(z, y)+.5*kd(z, t.flip(1)))

    def test_terms(self):
        a,b = student(0),student(1)
        table = fit_chain([a,b], teacher, 1, terms=Term('at', '1', '1'))
        assert table['at'].notna().all()

    def test_stage_in_the_table(self):
        a,b,rows = student(0),student(1),[]
        a.logger = b.logger = rows.append
        fit_chain([a,b], teacher, 1)
        assert [str(o[3]) for o in rows]==['assistant 1','student'] and [float(o[3]) for o in rows]==[1.,2.]
        assert [m.name for l in (a,b) for m in l.metrics]==['accuracy']*2

    def test_refused(self):
        "Before anything trains, also where only the last is wrong"
        a,b = student(0),student(1, (4,))
        was = weights(a.model)
        m = KnowledgeDistillation(teacher)
        for args,kw,msg in (([[a,b],teacher,[1]],{},'one for each'), ([[a,b],teacher,[1,0]],{},'at least 1'), ([[a,b],teacher,1,[.1,.1,.1]],{},'one for each'), ([[a,a],teacher,1],{},'the same model'), ([[a,b],teacher,1],dict(names=['x']),'one for each'),
            ([[],teacher,1],{},'at least one Learner'), ([[a,b.model],teacher,1],{},'are Learners'), ([[a,b],teacher,1],dict(terms=Term('at','1.0','1.0')),"no layer '1.0'"), ([[a,b],teacher,1],dict(alfa=.3),'alfa'), ([[a,b],teacher,1],dict(cbs=m),'leave yours out'), ([[a,b],teacher,1],dict(fit='fine_tune'),'`fit` must be')):
            with pytest.raises((ValueError,TypeError), match=msg): fit_chain(*args, **kw)
        assert same(was, a.model.state_dict())
        with pytest.raises(ValueError, match='share weights'): fit_chain([a], a.model, 1)

    def test_interrupted(self):
        a,b = student(0),student(1)
        class Stop(Callback):
            def after_step(self):
                if self.learn is b: raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt): fit_chain([a,b], teacher, 1, cbs=Stop())
        assert [m.name for l in (a,b) for m in l.metrics]==['accuracy']*2 and len(a.cbs)==len(b.cbs)==len(student().cbs)
        fit_chain([a,b], teacher, 1)

class TestBornAgain:
    def test_loss(self):
        asked,spy = [],Spy()
        def make(i): asked.append(i); return student(i)
        learns,table = born_again(make, teacher, 3, 1, 1e-2, T=1., alpha=.4, cbs=spy)
        assert asked==[1,2,3] and table.stage.tolist()==['generation 1','generation 2','generation 3']
        who = {id(l.model):t for l,t in zip(learns, (teacher.model,learns[0].model,learns[1].model))}
        assert len(spy.seen)==6
        for m,_,now,x,y,loss,_ in spy.seen:
            z,t = answers(now, who[id(m)], x)
            close(loss, .6*ce(z, y)+.4*kd(z, t, 1.))
        # together they are one teacher
        with torch.no_grad(): want = sum(l.model.eval()(x).softmax(1) for l in learns)/3
        e = Ensemble(learns).bind(learns[0])
        close(e(x), want.log())

    def test_refused(self):
        one = student()
        for make,n,msg in ((lambda i: one,2,'a new one at each call'), (lambda i: one.model,1,'must return a Learner'), (student,0,'`n_generations`'), (student,1.5,'`n_generations`'), (student,True,'`n_generations`')):
            with pytest.raises((ValueError,TypeError), match=msg): born_again(make, teacher, n, 1)

class TestSnapshots:
    @pytest.mark.parametrize('mult', [1,2])
    def test_copies(self, mult):
        "The model as it is at the end of each cycle, in which the rate falls along half a cosine"
        learn,ends,lrs = student(),[],[]
        class End(Callback):
            def after_step(self): lrs.append(self.opt.hypers[-1]['lr'])
            def after_fit(self): ends.append(weights(self.learn.model))
        learn.dls.train.rng = random.Random(0)
        snaps,table = fit_snapshots(learn, 3, 1, 1e-2, cycle_mult=mult, cbs=End())
        lens = [mult**i for i in range(3)]
        assert table.stage.tolist()==[f'cycle {i+1}' for i,n in enumerate(lens) for _ in range(n)] and len(snaps.teachers)==3
        assert all(same(e, t.model.state_dict()) for e,t in zip(ends, snaps.teachers))
        assert not {p.data_ptr() for p in learn.model.parameters()}&{p.data_ptr() for m in snaps.models for p in m.parameters()}
        want = [.005*(1+math.cos(math.pi*j/(2*n))) for n in lens for j in range(2*n)]
        np.testing.assert_allclose(lrs, want, rtol=1e-5)

    def test_teach(self):
        "The first cycle has the labels alone, the others the snapshot before"
        learn,spy = student(),Spy()
        snaps,table = fit_snapshots(learn, 3, 1, 1e-2, teach=True, T=2., alpha=.3, cbs=spy)
        for i,(_,_,now,x,y,loss,opt) in enumerate(spy.seen):
            c = i//2
            z,t = answers(now, snaps.teachers[c-1].model, x)
            close(loss, ce(z, y) if c==0 else .7*ce(z, y)+.3*kd(z, t, 2.))
        # one optimizer throughout
        assert len(spy.seen)==6 and len({id(o[-1]) for o in spy.seen})==1

    def test_as_teacher(self, tmp_path):
        "Live and stored, for a student with other names and normalisation"
        d = digits_dls(32, bs=16, batch_tfms=Normalize.from_stats([.3],[.4], cuda=False))
        learn = student(d=d)
        snaps,_ = fit_snapshots(learn, 2, 1, 1e-2)
        back = digits_dls(32, bs=16, vocab=[str(i) for i in reversed(range(10))])
        s,spy = student(1, d=back),Spy()
        s.fit(1, 1e-2, cbs=[KnowledgeDistillation(snaps),spy])
        _,_,now,x,y,loss,_ = spy.seen[0]
        with torch.no_grad(): z,t = now(x),sum(m.eval()((x-.3)/.4).softmax(1) for m in snaps.models)/2
        close(loss, .5*ce(z, y)+.5*kd(z, t.flip(1).log()))
        store = precompute_targets(snaps, back, tmp_path/'s', bar=noop)
        s.fit(1, 1e-2, cbs=KnowledgeDistillation(store))

    def test_refused_and_interrupted(self):
        learn = student()
        for args,kw,msg in (([0],{},'`n_cycles`'), ([1,0],{},'`cycle_len`'), ([1,1.],{},'`cycle_len`'), ([1],dict(cycle_mult=0),'`cycle_mult`'), ([1],dict(T=2.),'teach=True'), ([2],dict(teach=True, alfa=1),'alfa'), ([1],dict(cbs=KnowledgeDistillation(teacher)),'leave yours out')):
            was = weights(learn.model)
            with pytest.raises((ValueError,TypeError), match=msg): fit_snapshots(learn, *args, **kw)
            assert same(was, learn.model.state_dict()), kw
        class Stop(Callback):
            def after_epoch(self): raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt): fit_snapshots(learn, 2, cbs=Stop())
        assert [m.name for m in learn.metrics]==['accuracy']

class TestEarlyStopped:
    @pytest.mark.parametrize('stop', [.5,2])
    @pytest.mark.parametrize('task_weight', [None,.2])
    def test_loss(self, stop, task_weight):
        "From there on the task alone, with its whole weight; the teacher is not asked"
        learn,spy,n = student(),Spy(),[]
        t = Teacher(teacher, output=lambda o: n.append(1) or o)
        learn.fit(4, 1e-2, cbs=[KnowledgeDistillation(t, alpha=.9, task_weight=task_weight, stop=stop),spy])
        for _,e,now,x,y,loss,_ in spy.seen:
            z,zt = answers(now, teacher.model, x)
            close(loss, (.1 if task_weight is None else .2)*ce(z, y)+.9*kd(z, zt) if e<2 else ce(z, y))
        assert [o[1] for o in spy.seen]==[0,0,1,1,2,2,3,3]
        assert np.isnan(fit_table(learn).kd_loss).tolist()==[False]*2+[True]*2
        asked = len(n)
        learn.fit(4, 1e-2, cbs=KnowledgeDistillation(t, stop=stop))
        # 4 in training; in the second fit the data are known, so nothing is asked before it
        assert 4<=len(n)-asked<=8
