"How much of the gradient is the teacher's: the columns against autograd of the whole thing, and the warning"
import pytest
from fastai.vision.all import *
from fastkd.all import *
from fastkd.test_utils import *
from copy import deepcopy
from test_regressions import Bf16
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]
pytestmark = pytest.mark.filterwarnings('ignore')
KD = KnowledgeDistillation

few = digits_dls(128, bs=32)
good = digits_teacher(epochs=2, widths=(8,16))
tasks = {k:(d:=digits_dls(128, task=k),digits_teacher(d, epochs=1, widths=(8,))) for k in ('traits','center','ink')}
def fit(learn, n=1, lr=1e-2, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kw)
    return learn
def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.state_dict().values()])
def tensors(o): return [o] if isinstance(o, Tensor) else [v for v in (o.values() if isinstance(o, dict) else o)]

class Whole(Callback):
    "Gradients at the prediction of the whole loss and of the task's part, by the real backward pass and by the Learner's loss function alone"
    order,run_valid = KD.order+1,False
    def __init__(self, w=.5): self.w,self.rows = w,[]
    def before_fit(self): self.rows = []
    def after_loss(self):
        l,w = self.learn,self.w(self.learn.pct_train) if callable(self.w) else self.w
        zs = tensors(l.pred)
        self.got = [None]*len(zs)
        for i,z in enumerate(zs): z.register_hook(partial(self.note, i))
        new = [z.detach().clone().requires_grad_() for z in zs]
        pred = new[0] if isinstance(l.pred, Tensor) else dict(zip(l.pred, new)) if isinstance(l.pred, dict) else tuple(new)
        self.task = self.flat([torch.zeros_like(z) if g is None else g for z,g in zip(new, torch.autograd.grad(w*l.loss_func(pred, *l.yb), new, allow_unused=True))])
        self.k = (l.loss_grad/l.loss).item()
    def flat(self, gs): return torch.cat([g.detach().as_subclass(Tensor).double().flatten() for g in gs])
    def note(self, i, g): self.got[i] = g
    def after_backward(self):
        # accumulation and loss scaling multiply the whole
        zs = tensors(self.learn.pred)
        scale = self.learn.scaler.get_scale() if getattr(self.learn, 'scaler', None) is not None else 1.
        tot = self.flat([torch.zeros_like(z) if g is None else g for g,z in zip(self.got, zs)])/self.acc(scale)
        kd = tot-self.task
        self.rows.append((self.epoch,self.iter,self.learn.n_iter,self.task.norm().item(),kd.norm().item(),(kd@self.task).item()))
    def acc(self, scale):
        o = first(cb for cb in self.learn.cbs if isinstance(cb, GradientAccumulation))
        return scale if o is None else scale*find_bs(self.learn.yb)/o.n_acc

class NoBatchNorm(Callback):
    def before_batch(self): self.learn.model.eval()

def check(learn, *args, w=.5, n=2, cbs=(), tol=1e-6, **kw):
    "Both columns of every epoch are those of the steps that were measured"
    spy = Whole(w)
    fit(learn, n, cbs=[KD(*args, log='grad', **kw), spy, *L(cbs)])
    t,used = fit_table(learn),0
    for e in range(n):
        rows = [o for o in spy.rows if o[0]==e and o[1]%min(16, o[2])==min(16, o[2])//2]
        used += len(rows)
        a,b,c,ab = [sum(f(*o[3:]) for o in rows) for f in (lambda a,b,c: a, lambda a,b,c: b, lambda a,b,c: c, lambda a,b,c: a*b)]
        assert t.kd_grad_share[e]==pytest.approx(b/(a+b), rel=tol, abs=tol)
        assert t.kd_grad_cos[e]==pytest.approx(c/ab, rel=5*tol, abs=5*tol)
    assert used>=n
    return t

class TestValues:
    @pytest.mark.parametrize('alpha,w', [(.3,None),(.9,2.),(.5,1.)])
    def test_softmax(self, alpha, w): check(digits_learner(few), good, alpha=alpha, task_weight=w, w=1-alpha if w is None else w)

    def test_formulas(self):
        "w(p-y)/n and alpha*T*(p_T-q_T)/n"
        seen = []
        class See(Callback):
            order,run_valid = KD.order+1,False
            def after_loss(self): seen.append((self.x.clone(),self.y.clone(),self.learn.pred.detach().double()))
        learn = fit(digits_learner(few), cbs=[KD(good, T=3., alpha=.3, log='cost,grad'), See()])
        x,y,z = seen[2]
        with torch.no_grad(): q = (good.model.eval()(x).double()/3).softmax(1)
        a,b = .7*(z.softmax(1)-F.one_hot(y.as_subclass(Tensor), 10))/32,.3*3*((z/3).softmax(1)-q)/32
        v = fit_table(learn).iloc[0]
        assert v.kd_grad_share==pytest.approx((b.norm()/(a.norm()+b.norm())).item(), rel=1e-6)
        assert v.kd_grad_cos==pytest.approx(((a*b).sum()/(a.norm()*b.norm())).item(), rel=1e-6)
        assert 0<v.teacher_share<1

    def test_sample(self):
        "One of 16 steps, two of 43"
        t = check(digits_learner(digits_dls(128, bs=3)), good)
        assert list(t)[-2:]==['kd_grad_share','kd_grad_cos']

    def test_schedules(self):
        check(digits_learner(few), good, T=SchedExp(8,1), alpha=SchedLin(.9,.1), w=lambda p: 1-(.9-.8*p), n=3)

    def test_losses_with_labels(self):
        for l in ('nkd','dist','mlkd'): check(digits_learner(few), good, l)

    def test_mixup_and_smoothing(self):
        check(digits_learner(few, loss_func=LabelSmoothingCrossEntropyFlat()), good, cbs=MixUp(.4))
        check(digits_learner(few), good, 'nkd', cbs=CutMix())

    @pytest.mark.parametrize('task', tasks)
    def test_tasks(self, task):
        dls,t = tasks[task]
        check(digits_learner(dls), t)

    def test_segmentation_that_ignores(self):
        dls,t = tasks['ink']
        check(digits_learner(dls, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=0), metrics=[]), t)

    def test_large_answers(self, monkeypatch):
        "The lean form of the loss computes its gradient beforehand, and must not use it up"
        monkeypatch.setattr(LeanKL, 'above', 1)
        check(digits_learner(few), good)

    def test_accumulation(self): check(digits_learner(few), good, cbs=GradientAccumulation(64))

    def test_bf16(self): check(digits_learner(few), good, cbs=Bf16(), tol=1e-5)

    def test_loss_scaling(self):
        "What backward multiplies is not measured"
        class Scaled(Callback):
            order,run_valid = KD.order+2,False
            def before_backward(self): self.learn.loss_grad = self.learn.loss_grad*1024
        spied = check(digits_learner(few), good)
        learn = fit(digits_learner(few), 2, cbs=[KD(good, log='grad'), Scaled()], lr=0.)
        other = fit(digits_learner(few), 2, cbs=[KD(good, log='grad')], lr=0.)
        assert (fit_table(learn)[['kd_grad_share','kd_grad_cos']].values==fit_table(other)[['kd_grad_share','kd_grad_cos']].values).all() and spied is not None

    def test_stored(self, tmp_path):
        store = precompute_targets(good, few, tmp_path/'s', dtype='float32', bar=noop)
        live,stored,carried = check(digits_learner(few), good),check(digits_learner(few), store),check(digits_learner(store.attach(few)))
        for t in (stored,carried): np.testing.assert_allclose(t[['kd_grad_share','kd_grad_cos']], live[['kd_grad_share','kd_grad_cos']], rtol=1e-3)
        check(digits_learner(few), precompute_targets(good, few, tmp_path/'r', 'sparse', T=4., k=4, bar=noop), T=4.)

    def test_heads(self):
        "The task reaches one head, the teacher the other: both are counted"
        class Two(nn.Module):
            def __init__(self): super().__init__(); self.m,self.a,self.b = tiny_cnn()[:-1],nn.Linear(16,10),nn.Linear(16,10)
            def forward(self, x):
                x = self.m(x)
                return self.a(x),self.b(x)
        for kw in (dict(), dict(pred_kd=0)):
            set_seed(0, reproducible=True)
            few.train.rng = random.Random(0)
            t = check(Learner(few, Two(), loss_func=lambda p,y: F.cross_entropy(p[0], y)), good, 'kd', **kw)
            assert (t.kd_grad_cos.abs()<1e-9).all()==(not kw) and (t.kd_grad_share>.05).all()

    def test_dict_with_features(self):
        "A hidden layer that the model hands out is no logit"
        class Out(nn.Module):
            def __init__(self): super().__init__(); self.m,self.l = tiny_cnn()[:-1],nn.Linear(16,10)
            def forward(self, x):
                h = self.m(x)
                return {'hidden':h, 'logits':self.l(h)}
        rows = []
        for m,lf in ((Out(),lambda p,y: F.cross_entropy(p['logits'], y)),(None,F.cross_entropy)):
            torch.manual_seed(0)
            m = Out() if m is not None else nn.Sequential(*tiny_cnn()[:-1],nn.Linear(16,10))
            if rows: m.load_state_dict({k.replace('l.','5.') if k.startswith('l.') else k[2:]:v for k,v in was.items()})
            was = deepcopy(m.state_dict())
            set_seed(0, reproducible=True)
            few.train.rng = random.Random(0)
            rows.append(fit_table(fit(Learner(few, m, loss_func=lf), 2, cbs=KD(good, 'kd', log='grad')))[['kd_grad_share','kd_grad_cos']])
        np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5)

    def test_whole_dicts(self):
        class Out(nn.Module):
            def __init__(self, m): super().__init__(); self.m = m
            def forward(self, x):
                z = self.m(x)
                return {'a':z, 'b':z*2}
        set_seed(0, reproducible=True)
        few.train.rng = random.Random(0)
        learn = Learner(few, Out(tiny_cnn()), loss_func=lambda p,y: F.cross_entropy(p['a'], y))
        t = fit_table(fit(learn, cbs=KD(Teacher(Out(deepcopy(good.model)), output=noop), DictLoss({'a':'kd','b':'kd'}), log='grad')))
        assert 0<t.kd_grad_share[0]<1 and -1<t.kd_grad_cos[0]<1

    def test_terms(self):
        "A term on logits counts, one on a layer does not; without anything on logits there is no value"
        check(digits_learner(few), good, terms=[Term('dist', weight=.7), Term('hint', '1', '1', weight=100.)])
        check(digits_learner(few), good, alpha=0, w=1., terms=Term('mse_logits', weight=SchedLin(.1,1.)))
        t = fit_table(fit(digits_learner(few), cbs=KD(good, alpha=0, terms=Term('hint', '1', '1'), log='grad')))
        assert t.kd_grad_share.isna().all() and t.kd_grad_cos.isna().all() and (t.hint>0).all()

    def test_unlabelled_items(self):
        x,y = [torch.cat(o).as_subclass(Tensor) for o in zip(*few.train.new(shuffle=False))]
        y = y.where(torch.arange(len(y))%3==0, -100)
        b = list(zip(x, y))
        d = DataLoaders(*(DataLoader(b, bs=32, num_workers=0) for _ in range(2)))
        set_seed(0, reproducible=True)
        check(Learner(d, tiny_cnn(), loss_func=LabelledLoss()), good)

    def test_no_labels(self):
        "The teacher alone: its share is 1, and there is nothing to compare its direction with"
        x = [torch.cat(o).as_subclass(Tensor) for o in zip(*few.train.new(shuffle=False))][0]
        d = DataLoaders(*(DataLoader([(o,) for o in x], bs=32, num_workers=0) for _ in range(2)))
        learn = fit(Learner(d, tiny_cnn(), loss_func=CrossEntropyLossFlat()), cbs=KD(good, alpha=1, log='grad'))
        assert fit_table(learn).kd_grad_share.tolist()==[1.] and fit_table(learn).kd_grad_cos.isna().all()
        t = fit_table(fit(digits_learner(few), cbs=KD(good, alpha=1, log='grad')))
        assert t.kd_grad_share.tolist()==[1.] and t.kd_grad_cos.isna().all()

    def test_window(self):
        "Epochs without distillation have no value"
        t = fit_table(fit(digits_learner(few), 4, cbs=KD(good, start=1, stop=3, log='grad')))
        assert t.kd_grad_share.isna().tolist()==[True,False,False,True]

    def test_window_of_a_teacher_that_learns(self):
        "It trains on, and nothing is distilled"
        t = fit_table(fit(digits_learner(few), 2, cbs=KD(digits_learner(few, seed=1), start=1, teacher_weight=1., terms=Term('dist'), log='grad')))
        assert t.kd_grad_share.isna().tolist()==[True,False]

    def test_missing_classes(self):
        torch.manual_seed(0)
        check(digits_learner(few), Teacher(tiny_cnn((4,8), 7), vocab=[str(i) for i in range(7)], missing='ignore'))

    def test_frozen_student(self):
        "No gradient at the logits, no value"
        class Const(nn.Module):
            def __init__(self): super().__init__(); self.m,self.p = deepcopy(good.model).requires_grad_(False),nn.Parameter(torch.zeros(1))
            def forward(self, x):
                with torch.no_grad(): return self.m(x)
        learn = Learner(few, Const(), loss_func=lambda p,y: F.cross_entropy(p, y)+learn.model.p.sum())
        assert fit_table(fit(learn, cbs=KD(tiny_cnn(), 'kd', log='grad'))).kd_grad_share.isna().all()

class TestUnchanged:
    @pytest.mark.parametrize('cbs', [lambda: [], lambda: [MixUp()], lambda: [GradientAccumulation(50)], lambda: [Bf16()]])
    def test_bit_for_bit(self, cbs, monkeypatch):
        "Measured, with and without columns, or not at all"
        res = []
        for log in ('none',True,'grad','cost,grad'):
            with monkeypatch.context() as mp:
                if log=='none': mp.setattr(KD, '_note_grad', noop)
                learn = digits_learner(few)
                learn.model.insert(3, nn.Dropout(.2))
                fit(learn, 3, cbs=[KD(good, 'nkd', terms=Term('at', '1', '1'), log=True if log=='none' else log),*cbs()])
                res.append((weights(learn),torch.rand(1)))
        for w,r in res[1:]: assert torch.equal(w, res[0][0]) and torch.equal(r, res[0][1])

    def test_few_backward_passes(self, monkeypatch):
        "By default few steps of the first epoch are measured; with the columns one of 16 of each"
        import fastkd.grad_share as m
        n,f = [],m.grad_parts
        monkeypatch.setattr(m, 'grad_parts', lambda *a: n.append(1) or f(*a))
        dls = digits_dls(128, bs=4)
        for log,want in ((True,6),(False,6),('grad',6+3*2)):
            n.clear()
            fit(digits_learner(dls), 3, cbs=KD(good, log=log))
            assert len(n)==want
        n.clear()
        fit(digits_learner(digits_dls(128, bs=1), loss_func=F.cross_entropy), 1, cbs=[KD(good),NoBatchNorm()])
        assert len(n)==7

class Once(torch.autograd.Function):
    "As torch compiles a loss: its gradient can be had once"
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g):
        if torch._C._autograd._get_current_graph_task_keep_graph(): raise RuntimeError('only once')
        return g

def test_a_gradient_that_can_be_had_once(monkeypatch):
    "Training goes on; whoever asked for the columns is told"
    res = []
    for log in (None,True,'grad'):
        with monkeypatch.context() as mp, warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            if log is None: mp.setattr(KD, '_note_grad', noop)
            learn = digits_learner(few, loss_func=lambda p,y: F.cross_entropy(Once.apply(p), y))
            fit(learn, 2, cbs=KD(good, 'kd', log=log or True))
        res.append(weights(learn))
        assert len([o for o in w if 'cannot be measured' in str(o.message) and 'only once' in str(o.message)])==(log=='grad')
    assert torch.equal(res[0], res[1]) and torch.equal(res[0], res[2]) and fit_table(learn).kd_grad_share.isna().all()

class TestWarning:
    def warned(self, *args, learn=None, n=2, cbs=(), f=None, **kw):
        learn = learn or digits_learner(few)
        with warnings.catch_warnings(record=True) as w, learn.no_bar(), learn.no_logging():
            warnings.simplefilter('always')
            (f or learn.fit)(n, 1e-2, cbs=[KD(*args, **kw),*L(cbs)])
        return [str(o.message) for o in w if 'of the gradient' in str(o.message)]

    def test_low(self):
        for kw in (dict(), dict(log=False), dict(log='grad')):
            w, = self.warned(good, alpha=.001, **kw)
            for o in ('the teacher has hardly any say','raise `alpha` (0.001)','`T`','kd_find',"log='grad'"): assert o in w
            assert 0<float(w.split('distillation has ')[1].split('%')[0])<1

    def test_high(self):
        w, = self.warned(good, WeightedSum({'kd':(KDLoss(), 1000.)}))
        for o in ('the task loss has hardly any say',"the loss's own weights",'`task_weight`','`alpha=1`'): assert o in w
        assert 99<float(w.split('distillation has ')[1].split('%')[0])<=100

    def test_terms(self):
        assert 'terms on layers not counted' in self.warned(good, alpha=.001, terms=Term('hint', '1', '1'))[0]
        assert self.warned(good, alpha=0, terms=Term('hint', '1', '1'))==[]

    def test_each_fit_once(self):
        learn,kd = digits_learner(few),KD(good, alpha=.001)
        for _ in range(2):
            with warnings.catch_warnings(record=True) as w, learn.no_bar(), learn.no_logging():
                warnings.simplefilter('always')
                learn.fit(30, 1e-4, cbs=kd)
            assert len([o for o in w if 'of the gradient' in str(o.message)])==1

    def test_not_when_it_is_meant(self, tmp_path):
        "Constant weights of 0 or 1, ends of schedules, windows, teachers that follow the student"
        for kw in (dict(), dict(alpha=0), dict(alpha=0, task_weight=.5), dict(alpha=1), dict(task_weight=0), dict(alpha=SchedLin(0,1)), dict(alpha=SchedLin(1,0)), dict(alpha=SchedCos(.001,.002)), dict(start=.5), dict(stop=1),
            dict(start=50), dict(T=SchedExp(20,1))): assert self.warned(good, **kw)==[], kw
        assert self.warned(EMATeacher(.9))==[]
        assert self.warned(digits_learner(few, seed=1), teacher_weight=1.)==[]
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            ls = [digits_learner(few, seed=i) for i in range(2)]
            for l in ls: l.dls,l.logger = few,noop
            with ls[0].no_bar(), ls[1].no_bar(): mutual_learning(ls, 1, 1e-3)
            learn = digits_learner(few, path=tmp_path, cbs=KD(good, alpha=.001))
            with learn.no_bar(), learn.no_logging(): learn.lr_find(show_plot=False); learn.validate()
        assert not [o for o in w if 'of the gradient' in str(o.message)]

    def test_middle_of_a_schedule(self):
        "A loss that is too large by far is found where the schedule has left its end"
        w, = self.warned(good, WeightedSum({'kd':(KDLoss(), 1e4)}), alpha=SchedLin(0,1), n=4)
        assert '`alpha` (a schedule)' in w

    def test_interrupted(self):
        "What was measured before is forgotten"
        class Stop(Callback):
            def after_batch(self):
                if self.training and self.iter==2: raise KeyboardInterrupt
        learn,kd = digits_learner(few),KD(good, alpha=.001)
        with pytest.raises(KeyboardInterrupt): fit(learn, cbs=[kd,Stop()])
        kd.alpha = .5
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            fit(learn, cbs=kd)
        assert not [o for o in w if 'of the gradient' in str(o.message)]

def test_log():
    a,b = [[c for c in fit_table(fit(digits_learner(few), cbs=KD(good, log=o)))] for o in ('cost,grad','grad,cost')]
    assert a==b and 'teacher_share' in a
    for o in ('time','grad,time','gradcost','','grad,',['grad'],2,None):
        with pytest.raises(ValueError, match="'cost', 'grad' or 'cost,grad'"): KD(good, log=o)
    assert not [c for c in fit_table(fit(digits_learner(few), cbs=KD(good))) if 'grad' in c]

def test_grad_parts_leaves_the_graph():
    z = torch.randn(4,3,requires_grad=True)
    l = F.cross_entropy(z, torch.zeros(4).long())
    a,b,c = grad_parts(l, 2*l, z).tolist()
    assert b==pytest.approx(2*a) and c==pytest.approx(a*b) and z.grad is None
    l.backward()
    assert z.grad.norm().item()==pytest.approx(a)
    assert grad_parts(l.detach(), tensor(1.), [z]).tolist()==[0.,0.,0.]

def rank_of_two(rank, port, d):
    "What one of two processes saw in the step that is measured, and its columns"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    import _ddp
    _ddp.without_gpu()
    seen = []
    class See(Callback):
        order,run_valid = KD.order+1,False
        def after_loss(self): seen.append((self.x.as_subclass(Tensor),self.y.as_subclass(Tensor),self.learn.pred.detach().as_subclass(Tensor)))
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        learn = _ddp.fit(_ddp.make(), KD(_ddp.teacher(), T=2., alpha=.001, log='grad'), n=1, lr=0., cbs=See())
    torch.save((seen,_ddp.table(learn),[str(o.message) for o in w if 'of the gradient' in str(o.message)]), d/f'{rank}.pt')

def test_two_processes(tmp_path):
    "Each measures its own batches, the columns are of all, and one of them warns"
    pytest.importorskip('accelerate')
    import _ddp,socket
    from conftest import ended,start
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    for p in [start(rank_of_two, r, port, tmp_path) for r in range(2)]: assert ended(p).exitcode==0
    res,t,parts = [torch.load(tmp_path/f'{r}.pt', weights_only=False) for r in range(2)],_ddp.teacher().eval(),[]
    for seen,*_ in res:
        assert len(seen)==6
        x,y,z = seen[3][0],seen[3][1],seen[3][2].double()
        with torch.no_grad(): q = (t(x).double()/2).softmax(1)
        a,b = .999*(z.softmax(1)-F.one_hot(y, 4))/len(z),.001*2*((z/2).softmax(1)-q)/len(z)
        parts.append([a.norm(),b.norm(),(a*b).sum(),a.norm()*b.norm()])
    a,b,c,ab = tensor(parts).sum(0).tolist()
    for _,tab,_ in res:
        assert tab['kd_grad_share']==pytest.approx(b/(a+b), rel=1e-6) and tab['kd_grad_cos']==pytest.approx(c/ab, abs=1e-6)
    assert [len(o[2]) for o in res]==[1,0]
