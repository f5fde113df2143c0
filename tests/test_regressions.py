"What went wrong in other distillation tools, and what fastai does around a callback: each line here was a bug somewhere"
from fastai.vision.all import *
from fastai.tabular.all import *
from fastai.text.all import *
from fastkd.all import *
from fastkd.test_utils import *
import copy,math,pickle,subprocess,sys
from types import SimpleNamespace
import numpy as np,pandas as pd,pytest

# fastai brings fastcore's test helpers, which pytest would take for tests
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

pytestmark = pytest.mark.filterwarnings('ignore')
KD = KnowledgeDistillation

# -- small parts
def quiet(learn, f, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): return f(*args, **kwargs)
def fit(learn, n=1, lr=1e-2, **kwargs): return quiet(learn, learn.fit, n, lr, **kwargs)
def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.state_dict().values()])
def reseed(dls, n=0):
    "Weights, dropout and the order of the batches: the last is drawn from a state of the `DataLoader`'s own"
    set_seed(n, reproducible=True)
    dls.train.rng = random.Random(n)
def close(a, b, **kwargs): torch.testing.assert_close(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), **{'rtol':1e-6, 'atol':1e-6, **kwargs})

class Spy(Callback):
    "What each training step saw, right after `KnowledgeDistillation`"
    order,run_valid = KD.order+.5,False
    def __init__(self, f=None): self.f,self.steps = f,[]
    def after_loss(self):
        l = self.learn
        self.steps.append(SimpleNamespace(x=[o.clone() for o in l.xb], y=[o.clone() for o in l.yb], pred=to_detach(l.pred), loss=l.loss.item(), grad=l.loss_grad.item(),
            pct=l.pct_train, epoch=l.epoch, lf=l.loss_func, o=self.f(l) if self.f else None))

class Grads(Callback):
    "Gradients at each step that is taken"
    order,run_valid = MixedPrecision.order+1,False
    def __init__(self): self.o = []
    def before_step(self): self.o.append(torch.cat([p.grad.flatten() for p in self.learn.model.parameters()]).clone())

class Count(nn.Module):
    "A model that counts its calls"
    def __init__(self, m): super().__init__(); self.m,self.n,self.modes = m,0,[]
    def forward(self, *x):
        self.n += 1
        self.modes.append((self.training,torch.is_grad_enabled()))
        return self.m(*x)

def ask(m, x):
    with torch.no_grad(): return m.eval()(*x)
def kl(s, t, T, axis=1):
    "Per position, in float64, from probabilities: none of fastkd's code"
    s,t = s.double()/T,t.double()/T
    p,q = t.softmax(axis),s.softmax(axis)
    return T**2*(p*(p/q).log()).sum(axis)
def bkl(s, t, T):
    p,q = (t.double()/T).sigmoid(),(s.double()/T).sigmoid()
    return T**2*(p*(p/q).log()+(1-p)*((1-p)/(1-q)).log())
def ce(s, y, **kwargs): return F.cross_entropy(s.double(), y.as_subclass(Tensor), **kwargs)

# -- data and teachers
@pytest.fixture(scope='module')
def few(): return digits_dls(128)
@pytest.fixture(scope='module')
def few_copy(): return digits_dls(128)
@pytest.fixture(scope='module')
def teach(): return digits_teacher(epochs=3, widths=(8,16,32))
@pytest.fixture(scope='module')
def net(teach): return copy.deepcopy(teach.model)
@pytest.fixture(scope='module')
def tasks():
    res = {}
    for task in ('traits','center','ink'):
        dls = digits_dls(128, task=task)
        res[task] = dls,digits_teacher(dls, epochs=1, widths=(8,16)).model
    return res

def linear(dls, **kwargs):
    "No batch norm: gradients of parts of a batch add up"
    set_seed(0)
    return Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64,10)), loss_func=CrossEntropyLossFlat(), **kwargs)

# ---------------------------------------------------------------- the loss of a batch is the formula
class TestFormula:
    def check(self, learn, net, formula, n=2, tol=1e-6, cbs=(), **kw):
        spy = Spy()
        fit(learn, n, cbs=[KD(net, **kw), spy, *L(cbs)])
        assert len(spy.steps)>=2
        for s in spy.steps:
            want = formula(s, ask(net, s.x))
            close(s.loss, want, rtol=tol, atol=tol)
            close(s.grad, want, rtol=tol, atol=tol)
        return spy

    @pytest.mark.parametrize('alpha,w', [(.3,None), (.3,1.), (1.,None), (1.,0.), (.5,0.), (.9,2.)])
    def test_softmax(self, few, net, alpha, w):
        a,b = alpha,1-alpha if w is None else w
        self.check(digits_learner(few), net, lambda s,t: b*ce(s.pred, s.y[0])+a*kl(s.pred, t, 3).mean(), T=3., alpha=alpha, task_weight=w)

    def test_default_temperature(self, few, net):
        T = KDLoss().T
        self.check(digits_learner(few), net, lambda s,t: .5*ce(s.pred, s.y[0])+.5*kl(s.pred, t, T).mean())

    def test_multi_label(self, tasks):
        dls,net = tasks['traits']
        self.check(digits_learner(dls), net, lambda s,t: .6*F.binary_cross_entropy_with_logits(s.pred.double(), s.y[0].double())+.4*bkl(s.pred, t, 2).mean(), T=2., alpha=.4)

    def test_multi_label_sees_a_shift(self, tasks):
        "Softmax sees no difference between 'all labels' and 'none'"
        dls,_ = tasks['traits']
        class Const(nn.Module):
            def __init__(self, v): super().__init__(); self.v = v
            def forward(self, x): return x.new_full((len(x),3), self.v)
        self.check(digits_learner(dls), Const(3.), lambda s,t: bkl(s.pred, torch.full_like(s.pred, 3.), 4).mean(), alpha=1, T=4.)
        a,b = ([s.loss for s in self.check(digits_learner(dls), Const(v), lambda s,t: bkl(s.pred, t, 4).mean(), alpha=1, T=4.).steps] for v in (3.,-3.))
        assert all(abs(i-j)>.1 for i,j in zip(a,b))

    @pytest.mark.parametrize('lf,f', [(MSELossFlat(), lambda a,b: (a-b)**2), (L1LossFlat(), lambda a,b: (a-b).abs()), (nn.HuberLoss(delta=.1), lambda a,b: torch.where((a-b).abs()<.1, .5*(a-b)**2, .1*((a-b).abs()-.05)))])
    def test_regression(self, tasks, lf, f):
        dls,net = tasks['center']
        self.check(digits_learner(dls, loss_func=lf, metrics=mae), net, lambda s,t: .3*f(s.pred.double(), s.y[0].double()).mean()+.7*f(s.pred.double(), t.double()).mean(), alpha=.7)

    @pytest.mark.parametrize('ignore', [-100,0])
    def test_segmentation(self, tasks, ignore):
        "Averaged over the positions that count, not over items"
        dls,net = tasks['ink']
        def formula(s, t):
            y = s.y[0].as_subclass(Tensor)
            assert ignore<0 or (y==ignore).any()
            return .5*ce(s.pred, y, ignore_index=ignore)+.5*kl(s.pred, t, 5)[y!=ignore].mean()
        self.check(digits_learner(dls, loss_func=CrossEntropyLossFlat(axis=1, ignore_index=ignore), metrics=[]), net, formula)

    def test_label_smoothing(self, few, net):
        self.check(digits_learner(few, loss_func=LabelSmoothingCrossEntropyFlat(eps=.2)), net, lambda s,t: .5*ce(s.pred, s.y[0], label_smoothing=.2)+.5*kl(s.pred, t, 4).mean(), T=4.)

    @pytest.mark.parametrize('lf', [nn.CrossEntropyLoss(), F.cross_entropy, partial(F.cross_entropy, label_smoothing=0.)])
    def test_plain_torch_loss(self, few, net, lf):
        self.check(digits_learner(few, loss_func=lf), net, lambda s,t: .5*ce(s.pred, s.y[0])+.5*kl(s.pred, t, 4).mean(), T=4.)

    def test_hard(self, few, net):
        self.check(digits_learner(few), net, lambda s,t: .5*ce(s.pred, s.y[0])+.5*ce(s.pred, t.argmax(1)), loss='hard')

    @pytest.mark.parametrize('f', [kd_loss, partial(kd_loss, T=2.), KDLoss(T=2.), lambda inp, teach: kd_loss(inp, teach, T=2.)])
    def test_loss_as_function(self, few, net, f):
        T = KDLoss().T if f is kd_loss else 2
        self.check(digits_learner(few), net, lambda s,t: .5*ce(s.pred, s.y[0])+.5*kl(s.pred, t, T).mean(), loss=f)

    @pytest.mark.parametrize('f', [dkd_loss, lambda inp, teach, targ: dkd_loss(inp, teach, targ)])
    def test_label_loss_as_function(self, few, net, f):
        self.check(digits_learner(few), net, lambda s,t: .5*ce(s.pred, s.y[0])+.5*dkd_loss(s.pred, t, s.y[0]), loss=f, tol=1e-5)

    def test_weighted_sum(self, few, net):
        loss = WeightedSum({'a':(KDLoss(T=2.), .25), 'b':('hard', 3.)})
        self.check(digits_learner(few), net, lambda s,t: .5*ce(s.pred, s.y[0])+.5*(.25*kl(s.pred, t, 2).mean()+3*ce(s.pred, t.argmax(1))), loss=loss)

    def test_shift_of_teacher_logits(self, few, net):
        "Keras 3.15 clipped raw logits: a constant made its loss 0"
        class Shift(nn.Module):
            def __init__(self): super().__init__(); self.m = net
            def forward(self, x): return self.m(x)-10
        self.check(digits_learner(few), Shift(), lambda s,t: kl(s.pred, ask(net, s.x), 4).mean(), T=4., alpha=1, tol=1e-5)

    def test_deit_tuple(self, few, net):
        class Deit(nn.Module):
            def __init__(self): super().__init__(); self.body,self.a,self.b = nn.Sequential(nn.Flatten(), nn.Linear(64,16), nn.ReLU()),nn.Linear(16,10),nn.Linear(16,10)
            def forward(self, x):
                x = self.body(x)
                return self.a(x),self.b(x)
        def lf(pred, y): return F.cross_entropy(pred[0] if isinstance(pred, tuple) else pred, y.as_subclass(Tensor))
        for kw,i in ((dict(loss=HardKDLoss()),1), (dict(loss='hard', pred_kd=0),0), (dict(loss='hard', pred_kd=lambda o: o[1]),1)):
            set_seed(0)
            self.check(Learner(few, Deit(), loss_func=lf), net, lambda s,t: .5*ce(s.pred[0], s.y[0])+.5*ce(s.pred[i], t.argmax(1)), **kw)

    def test_ensemble(self, few, net):
        set_seed(3)
        other = tiny_cnn((4,8))
        spy = Spy()
        fit(digits_learner(few), 2, cbs=[KD(Ensemble([net,other], weights=[3,1]), T=2., alpha=1), spy])
        for s in spy.steps:
            p = .75*ask(net, s.x).double().softmax(1)+.25*ask(other, s.x).double().softmax(1)
            close(s.loss, kl(s.pred, p.log(), 2).mean(), rtol=1e-5)

    def test_list_is_an_ensemble(self, few, net): self.check(digits_learner(few), net, lambda s,t: kl(s.pred, t, 4).mean(), T=4., alpha=1) and fit(digits_learner(few), cbs=KD([net,tiny_cnn((4,8))]))

    @pytest.mark.parametrize('T', [.05,1e3])
    def test_reverse_kl_low_temperature(self, few, net, T):
        "Soup#719: finite loss, NaN gradient"
        learn,g = digits_learner(few),Grads()
        fit(learn, 2, cbs=[KD(net, 'rkl', T=T), g])
        assert weights(learn).isfinite().all() and all(o.isfinite().all() and o.abs().sum()>0 for o in g.o)

# ---------------------------------------------------------------- MixUp and CutMix
class TestMix:
    @pytest.mark.parametrize('mix', [MixUp,CutMix])
    @pytest.mark.parametrize('loss', [None,'dkd','nkd','wsld'])
    def test_two_labels(self, few, net, mix, loss):
        "The teacher sees the mixed batch; a loss that reads labels gets both, and lambda"
        set_seed(1)
        cb = mix()
        spy,lf = Spy(lambda l: (cb.yb1[0].clone(),cb.lam.clone())),get_loss(loss or 'kd')
        learn = digits_learner(few)
        was = learn.loss_func
        fit(learn, 2, cbs=[cb, KD(net, loss, alpha=.4), spy])
        assert learn.loss_func is was and spy.steps
        for s in spy.steps:
            y,(y1,lam),t = s.y[0].as_subclass(Tensor),s.o,ask(net, s.x)
            lam = lam.double().expand(len(y))
            task = (lam*ce(s.pred, y, reduction='none')+(1-lam)*ce(s.pred, y1, reduction='none')).mean()
            one = lambda i, y: call_loss(lf, s.pred[i:i+1], t[i:i+1], y[i:i+1].as_subclass(Tensor)).double()
            kd = kl(s.pred, t, lf.T).mean() if loss is None else sum(lam[i]*one(i,y)+(1-lam[i])*one(i,y1) for i in range(len(y)))/len(y)
            close(s.loss, .6*task+.4*kd, rtol=1e-5, atol=1e-5)
        if loss: assert (s.o[0]!=s.y[0]).any()

    def test_mixed_vectors(self, tasks):
        "Labels that are vectors are mixed themselves"
        dls,net = tasks['traits']
        spy = Spy()
        fit(digits_learner(dls), cbs=[MixUp(), KD(net, T=2.), spy])
        for s in spy.steps: close(s.loss, .5*F.binary_cross_entropy_with_logits(s.pred.double(), s.y[0].double())+.5*bkl(s.pred, ask(net, s.x), 2).mean())

# ---------------------------------------------------------------- beside other callbacks
class Penalty(Callback):
    "As fastai's RNNRegularizer: after the task loss, into `loss_grad`"
    order,run_valid = RNNRegularizer.order,False
    def after_loss(self): self.learn.loss_grad = self.learn.loss_grad+.5*sum((p**2).sum() for p in self.learn.model.parameters())

class Scale(Callback):
    "What mixed precision does to the loss, at its place"
    order,run_valid = MixedPrecision.order,False
    def before_backward(self): self.learn.loss_grad = self.learn.loss_grad*1024
    def before_step(self):
        for p in self.learn.model.parameters(): p.grad /= 1024

class Bf16(Callback):
    "`MixedPrecision` on the CPU"
    order = MixedPrecision.order
    def before_batch(self):
        self.ctx = torch.autocast('cpu', torch.bfloat16)
        self.ctx.__enter__()
    def after_pred(self): self.learn.pred = self.learn.pred.float()
    def after_loss(self): self.ctx.__exit__(None, None, None)

def hand_grad(learn, net, xs, ys, alpha=.5, T=4., penalty=0.):
    m = copy.deepcopy(learn.model).double()
    x,y = torch.cat(xs).double(),torch.cat(ys).as_subclass(Tensor)
    s = m(x.as_subclass(Tensor))
    loss = (1-alpha)*ce(s, y)+alpha*kl(s, ask(net, [x.float().as_subclass(Tensor)]), T).mean()+penalty*sum((p**2).sum() for p in m.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(m.parameters()))])

class TestOtherCallbacks:
    def test_order(self): assert RNNRegularizer.order<KD.order<GradientAccumulation.order<MixedPrecision.order<Recorder.order

    @pytest.mark.parametrize('cbs', [[],[Scale]])
    def test_accumulation(self, few, net, cbs):
        "Two batches of 64 with accumulation give the gradient of one of 128"
        learn,spy,g = linear(few),Spy(),Grads()
        fit(learn, 1, lr=0., cbs=[KD(net, T=4.), GradientAccumulation(128), spy, g, *[o() for o in cbs]])
        assert len(spy.steps)==2 and len(g.o)==1
        close(g.o[0], hand_grad(learn, net, [s.x[0] for s in spy.steps], [s.y[0] for s in spy.steps]))

    def test_displayed_loss(self, few, net):
        "The loss shown is that of the batch, not a part of it"
        seen = []
        class See(Callback):
            order,run_valid = Recorder.order+1,False
            def after_batch(self): seen.append((self.learn.loss.item(),self.learn.recorder.losses[-1].item(),to_detach(self.learn.pred),self.learn.xb,self.learn.yb[0]))
        fit(digits_learner(few), 1, cbs=[KD(net, T=4.), GradientAccumulation(128), See()])
        want = [(.5*ce(p, y)+.5*kl(p, ask(net, x), 4).mean()).item() for _,_,p,x,y in seen]
        close([o[0] for o in seen], want)
        # a smoothed mean, beta .98
        close(seen[1][1], (.98*want[0]+want[1])/1.98, rtol=1e-5)

    def test_regulariser_keeps_its_weight(self, few, net):
        "`torch.lerp(task, kd, w)` scales what others added"
        learn,spy,g = linear(few),Spy(),Grads()
        fit(learn, 1, lr=0., cbs=[KD(net, T=4., alpha=.9), Penalty(), spy, g])
        for s,o in zip(spy.steps, g.o): close(o, hand_grad(learn, net, [s.x[0]], [s.y[0]], alpha=.9, penalty=.5))

    def test_gradient_clip(self, few, net):
        learn,g = linear(few),Grads()
        fit(learn, cbs=[GradientClip(.01), KD(net), g])
        assert all(o.norm()<.0101 for o in g.o)

    def test_teacher_in_autocast(self, few, net):
        on = []
        class See(nn.Module):
            def __init__(self): super().__init__(); self.m = net
            def forward(self, x):
                on.append(torch.is_autocast_enabled('cpu'))
                return self.m(x)
        spy,dt = Spy(lambda l: l.loss.dtype),[]
        fit(digits_learner(few), cbs=[Bf16(), KD(See(), T=4., alpha=1), spy])
        assert on[-len(spy.steps):]==[True]*len(spy.steps)
        for s in spy.steps:
            with torch.autocast('cpu', torch.bfloat16): t = ask(net, s.x)
            assert t.dtype==torch.bfloat16 and s.o==torch.float32
            close(s.loss, kl(s.pred, t, 4).mean(), rtol=1e-5)

    def test_trackers_and_csv(self, few, net, tmp_path):
        learn = digits_learner(few, path=tmp_path)
        csv = CSVLogger()
        fit(learn, 3, lr=3e-2, cbs=[KD(net, alpha=SchedLin(.9,.1), T=SchedLin(8,1)), SaveModelCallback(monitor='kd_loss', fname='best'), EarlyStoppingCallback(monitor='kd_loss', patience=5), csv])
        names = ['train_loss','valid_loss','accuracy','task_loss','kd_loss','kd_alpha','kd_T']
        assert learn.recorder.metric_names==['epoch',*names,'time']
        df = pd.read_csv(tmp_path/'history.csv')
        assert list(df.columns)==['epoch',*names,'time'] and len(df)==3
        close(df[names].values, np.array(learn.recorder.values, dtype=float), rtol=1e-5)
        assert (tmp_path/'models'/'best.pth').exists()

    def test_early_stopping(self, few, net):
        learn = digits_learner(few)
        fit(learn, 6, lr=0., cbs=[KD(net), EarlyStoppingCallback(monitor='kd_loss', patience=1, min_delta=10)])
        assert learn.epoch==1 and learn.metrics.map(lambda m: m.name)==['accuracy']

    def test_columns_are_means(self, few, net):
        "Over the items of the epoch, the KD column without T²"
        learn,spy = digits_learner(few),Spy()
        fit(learn, 2, cbs=[KD(net, T=3., alpha=.25), spy])
        for e,row in enumerate(learn.recorder.values):
            ss = [s for s in spy.steps if s.epoch==e]
            close(row[3], np.mean([ce(s.pred, s.y[0]).item() for s in ss]), rtol=1e-5)
            close(row[4], np.mean([kl(s.pred, ask(net, s.x), 3).mean().item()/9 for s in ss]), rtol=1e-5)

    def test_no_log(self, few, net):
        learn = digits_learner(few)
        fit(learn, cbs=KD(net, log=False))
        assert learn.recorder.metric_names==['epoch','train_loss','valid_loss','accuracy','time']

    def test_validate_inside_a_fit(self, few, net):
        "before_fit and after_fit nest: the teacher is asked in every epoch all the same"
        class Val(Callback):
            order = 80
            def after_epoch(self):
                if not self.learn.lock.locked(): self.learn.validate()
        class NoVal(Callback): pass
        spies,ws = [],[]
        for cb in (Val(),NoVal()):
            spies.append(Spy())
            learn = digits_learner(few)
            reseed(few)
            fit(learn, 3, cbs=[KD(net, alpha=1, T=4.), cb, spies[-1]])
            ws.append(weights(learn))
            assert learn.metrics.map(lambda m: m.name)==['accuracy'] and not hook_count(learn.model, net)
        assert len(spies[0].steps)==6
        for s in spies[0].steps: close(s.loss, kl(s.pred, ask(net, s.x), 4).mean(), rtol=1e-5)
        assert torch.equal(*ws)

    @pytest.mark.parametrize('how', ['wrapped','subclass'])
    def test_another_fit(self, few, net, monkeypatch, tmp_path, how):
        "Experiment loggers wrap `Learner.fit`, projects write their own: columns and trackers of them are there all the same"
        fit_,seen = Learner.fit,[]
        @functools.wraps(fit_)
        def wrapper(*args, **kwargs):
            seen.append(1)
            return fit_(*args, **kwargs)
        class Mine(Learner):
            def fit(self, n_epoch, lr=None, wd=None, cbs=None, **kwargs):
                seen.append(1)
                with self.added_cbs(cbs):
                    self.create_opt()
                    self.opt.set_hypers(lr=self.lr if lr is None else lr)
                    self.n_epoch = n_epoch
                    self._with_events(self._do_fit, 'fit', CancelFitException, self._end_cleanup)
        if how=='wrapped': monkeypatch.setattr(Learner, 'fit', wrapper)
        learn = digits_learner(few, path=tmp_path) if how=='wrapped' else Mine(few, digits_learner(few).model, loss_func=CrossEntropyLossFlat(), path=tmp_path)
        fit(learn, 2, cbs=[KD(net), SaveModelCallback(monitor='kd_loss', fname='best')])
        assert seen and 'kd_loss' in learn.recorder.metric_names and (tmp_path/'models'/'best.pth').exists()

# ---------------------------------------------------------------- everything but training is as without the callback
@pytest.fixture
def pair(few, few_copy, teach, tmp_path):
    "Twice the same weights: with the callback and without; and the counter of the teacher's calls"
    n = Count(copy.deepcopy(teach.model))
    a = digits_learner(few, cbs=KD(n), path=tmp_path/'a')
    fit(a, 1)
    b = digits_learner(few_copy, path=tmp_path/'b')
    b.model.load_state_dict(a.model.state_dict())
    b.create_opt()
    b.opt.load_state_dict(a.opt.state_dict())
    n.n = 0
    return a,b,n

def same(a, b):
    if isinstance(a, Tensor): torch.testing.assert_close(a.as_subclass(Tensor), b.as_subclass(Tensor), rtol=0, atol=0)
    elif isinstance(a, (tuple,list,L)):
        assert len(a)==len(b)
        for i,j in zip(a, b): same(i, j)
    else: assert a==b

class TestOnlyTraining:
    def both(self, pair, f, silent=True):
        a,b,n = pair
        res = []
        for l in (a,b):
            reseed(l.dls)
            with l.no_bar(): res.append(f(l))
        same(*res)
        if silent: assert n.n==0
        assert a.metrics.map(lambda m: m.name)==b.metrics.map(lambda m: m.name)==['accuracy']
        return res[0]

    def test_get_preds(self, pair): self.both(pair, lambda l: l.get_preds(with_input=True, with_decoded=True))
    def test_losses(self, pair):
        res = self.both(pair, lambda l: l.get_preds(with_loss=True))
        close(res[2], ce(res[0].log(), res[1], reduction='none'), rtol=1e-4, atol=1e-5)
    def test_validate(self, pair):
        assert len(self.both(pair, lambda l: list(l.validate())))==2
        self.both(pair, lambda l: list(l.validate(ds_idx=0)))
    def test_predict(self, pair): self.both(pair, lambda l: [str(l.predict(l.dls.valid.items[3])[0]), *l.predict(l.dls.valid.items[3])[1:]])
    def test_unlabelled(self, pair): self.both(pair, lambda l: l.get_preds(dl=l.dls.test_dl(l.dls.valid.items[:70]))[0])
    def test_tta(self, pair): self.both(pair, lambda l: list(l.tta(n=2)))
    def test_summary(self, pair): self.both(pair, lambda l: [o for o in str(l.summary()).splitlines() if 'KnowledgeDistillation' not in o])
    def test_show_results(self, pair):
        self.both(pair, lambda l: l.show_results(max_n=2))
        plt.close('all')
    def test_interpretation(self, pair):
        a = self.both(pair, lambda l: [list(o) if isinstance(o, (tuple,L)) else o for o in ClassificationInterpretation.from_learner(l).top_losses(20)])
        b = self.both(pair, lambda l: tensor(ClassificationInterpretation.from_learner(l).confusion_matrix()))
    def test_lr_find(self, pair):
        losses = []
        def find(l):
            l.create_opt()
            lr = float(l.lr_find(num_it=20, show_plot=False)[0])
            losses.append(torch.stack(list(l.recorder.losses)))
            return lr,l.recorder.metric_names
        self.both(pair, find)
        close(*losses, rtol=1e-5)
        same(weights(pair[0]), weights(pair[1]))
    def test_lr_find_added(self, few, net, tmp_path):
        learn = digits_learner(few, path=tmp_path)
        with learn.added_cbs(KD(net)), learn.no_bar(): learn.lr_find(num_it=4, show_plot=False)
        assert learn.metrics.map(lambda m: m.name)==['accuracy'] and not hook_count(learn.model, net)

    def test_before_any_fit(self, few, few_copy, net, tmp_path):
        a,b = digits_learner(few, cbs=KD(net), path=tmp_path),digits_learner(few_copy, path=tmp_path)
        self.both((a,b,Count(net)), lambda l: [l.get_preds(with_loss=True), l.get_preds(dl=l.dls.test_dl(l.dls.valid.items[:70]))[0], list(l.validate()), l.tta(n=1)])

    def test_a_batch_between(self, pair):
        "A stale loss of training is not mixed into what comes after (D2)"
        a,b,n = pair
        for l in (a,b):
            reseed(l.dls)
            fit(l, 1, lr=0.)
        n.n = 0
        self.both(pair, lambda l: [l.get_preds(dl=l.dls.test_dl(l.dls.valid.items[:70]))[0], l.get_preds(with_loss=True)[2]])

    def test_valid_loss_is_the_task_loss(self, few, net):
        "D2, D13: what SaveModelCallback monitors is the cross-entropy"
        learn,ces = digits_learner(few),[]
        class See(Callback):
            def after_validate(self):
                x,y = self.learn.dls.valid.one_batch()
                with torch.no_grad(): ces.append(ce(self.learn.model.eval()(x.as_subclass(Tensor)), y).item())
        fit(learn, 3, cbs=[KD(net, alpha=SchedLin(0,1), T=4.), See()])
        close([v[1] for v in learn.recorder.values], ces, rtol=1e-5)

    def test_save_model_keeps_the_best(self, few, net, tmp_path):
        "D13: the epoch kept is the best one of the task"
        learn,losses = digits_learner(few, path=tmp_path),[]
        class See(Callback):
            def after_validate(self): losses.append((self.learn.recorder.loss.value.item(),weights(self.learn)))
        fit(learn, 3, lr=.1, cbs=[KD(net, alpha=SchedLin(0,1)), SaveModelCallback(), See()])
        assert torch.equal(weights(learn), min(losses, key=lambda o: o[0])[1])

    @pytest.mark.parametrize('valid', [True,False])
    def test_weight_zero_changes_nothing(self, few, net, valid):
        "Bit for bit, also the random state that dropout and shuffling draw from"
        ws = []
        for cbs in ([], [KD(net, alpha=0.)]):
            dls = few if valid else DataLoaders(few.train)
            reseed(dls)
            learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.Linear(64,10)), loss_func=CrossEntropyLossFlat())
            if not valid: learn._do_epoch_validate = lambda *args, **kwargs: None
            fit(learn, 2, cbs=cbs)
            ws.append((weights(learn),torch.rand(3),random.random(),np.random.rand()))
        same(*ws)

# ---------------------------------------------------------------- the teacher only answers
def hook_count(*ms): return sum(len(getattr(m, k)) for o in ms for m in o.modules() for k in ('_forward_hooks','_forward_pre_hooks','_backward_hooks'))

class TestTeacher:
    def test_no_graph(self, few, teach):
        "D1: no gradients, no step of batch norm, eval mode at every call; afterwards all as before"
        n = Count(copy.deepcopy(teach.model))
        n.train()
        n.m[0].eval()
        was,modes = {k:v.clone() for k,v in n.state_dict().items()},[m.training for m in n.modules()]
        fit(digits_learner(few), 2, cbs=KD(n))
        assert n.n>=4 and n.modes==[(False,False)]*n.n
        assert all(p.grad is None and p.requires_grad for p in n.parameters())
        assert all(torch.equal(v, was[k]) for k,v in n.state_dict().items()) and [m.training for m in n.modules()]==modes

    def test_saved_for_backward(self, few, net):
        "D1: nothing of the teacher is kept for the backward pass"
        learn = digits_learner(few)
        kept = []
        class See(Callback):
            order,run_valid = KD.order,False
            def before_batch(self):
                self.h = torch.autograd.graph.saved_tensors_hooks(lambda o: kept.append(o.data_ptr()) or o, lambda o: o)
                self.h.__enter__()
            def after_loss(self): self.h.__exit__(None, None, None)
        ps = {p.data_ptr() for p in net.parameters()}
        fit(learn, cbs=[KD(net), See()])
        assert kept and not ps&set(kept)

    @pytest.mark.parametrize('flip', [False,True])
    def test_no_dropout(self, few, flip):
        "mmrazor, NNCF: a teacher in train mode answers at random; also when somebody flips it amid the fit"
        set_seed(0)
        t = nn.Sequential(nn.Flatten(), nn.Dropout(.5), nn.Linear(64,10))
        class Flip(Callback):
            order,run_valid = KD.order-.1,False
            def after_loss(self): t.train()
        spy = Spy()
        fit(digits_learner(few), 2, cbs=[KD(t, alpha=1, T=4.), spy]+[Flip()]*flip)
        for s in spy.steps: close(s.loss, kl(s.pred, ask(t, s.x), 4).mean(), rtol=1e-5)

    def test_student_stays_in_train_mode(self, few, net):
        "KD_Lib: eval mode from the second epoch on. Keras: the student ran twice a step"
        modes,n = [],[]
        class See(Callback):
            run_valid = False
            def after_loss(self): modes.append(all(m.training for m in self.learn.model.modules()))
        learn = digits_learner(few)
        fit(learn, 3, cbs=[KD(net), See()])
        assert modes==[True]*6 and learn.model[0][1].num_batches_tracked==6

    def test_one_call_a_step(self, few, net):
        n = Count(net)
        spy = Spy(lambda l: n.n)
        fit(digits_learner(few), 3, cbs=[KD(n), spy])
        assert [s.o-spy.steps[0].o for s in spy.steps]==[0,1,2,3,4,5] and n.n==spy.steps[-1].o

    @pytest.mark.parametrize('kw,asked', [(dict(start=.5), [0,0,0,1,1,1]), (dict(stop=.5), [1,1,1,0,0,0]), (dict(start=1), [0,0,1,1,1,1]), (dict(stop=1), [1,1,0,0,0,0]), (dict(start=1, stop=2), [0,0,1,1,0,0]),
        (dict(start=.2, stop=2), [0,0,1,1,0,0]), (dict(alpha=0.), [0]*6), (dict(alpha=lambda p: float(p>.6)), [0,0,0,0,1,1]), (dict(start=1/3, stop=2/3), [0,0,1,1,0,0])])
    def test_window(self, few, net, kw, asked):
        "D15: a teacher without weight is not run, and outside its window the loss is the task's"
        n = Count(net)
        spy = Spy(lambda l: n.n)
        learn = digits_learner(few)
        fit(learn, 3, cbs=[KD(n, T=4., **kw), spy])
        calls = [s.o for s in spy.steps]
        first = calls[0]-asked[0]
        assert [b-a for a,b in zip([first]+calls, calls)]==asked
        for s,o in zip(spy.steps, asked):
            a = kw['alpha'](s.pct) if callable(kw.get('alpha')) else kw.get('alpha', .5)*o
            close(s.loss, (1-a)*ce(s.pred, s.y[0])+(a*kl(s.pred, ask(net, s.x), 4).mean() if a else 0), rtol=1e-5)
        rows = [[asked[2*e+i] for i in range(2)] for e in range(3)]
        for row,r in zip(learn.recorder.values, rows): assert any(r)!=math.isnan(row[4])

    def test_schedules(self, few, net):
        "Each step has the value of its place in training; the columns show it"
        T,alpha = SchedLin(8.,2.),SchedCos(.9,.1)
        kd = KD(net, T=T, alpha=alpha)
        spy,learn = Spy(lambda l: kd.loss_kd.T),digits_learner(few)
        fit(learn, 3, cbs=[kd, spy])
        for i,s in enumerate(spy.steps):
            close(s.pct, i/6)
            close(s.o, T(i/6))
            close(s.loss, (1-alpha(i/6))*ce(s.pred, s.y[0])+alpha(i/6)*kl(s.pred, ask(net, s.x), T(i/6)).mean(), rtol=1e-5)
        for e,row in enumerate(learn.recorder.values): close(row[5:7], [np.mean([alpha((2*e+i)/6) for i in range(2)]), np.mean([T((2*e+i)/6) for i in range(2)])])

    def test_users_loss_is_not_changed(self, few, net):
        loss = KDLoss(T=3.)
        fit(digits_learner(few), cbs=KD(net, loss, T=SchedLin(8.,2.)))
        assert loss.T==3 and loss.reduction=='mean'

    def test_learner_and_normalisation(self, few, few_copy, teach):
        "D4: a Learner as the teacher; it keeps working by itself"
        before = teach.model.training,[id(o) for o in teach.cbs],teach.get_preds()[0]
        spy = Spy()
        fit(digits_learner(few), cbs=[KD(teach, T=4., alpha=1), spy])
        for s in spy.steps: close(s.loss, kl(s.pred, ask(copy.deepcopy(teach.model), s.x), 4).mean(), rtol=1e-5)
        assert torch.equal(teach.get_preds()[0], before[2]) and [id(o) for o in teach.cbs]==before[1]

    def test_tuple_teacher(self, few, net):
        class Two(nn.Module):
            def __init__(self): super().__init__(); self.m = net
            def forward(self, x): return self.m(x),torch.zeros(len(x),3)
        for out in (0, lambda o: o[0]):
            spy = Spy()
            fit(digits_learner(few), cbs=[KD(Teacher(Two(), output=out), T=4., alpha=1), spy])
            for s in spy.steps: close(s.loss, kl(s.pred, ask(net, s.x), 4).mean(), rtol=1e-5)

    def test_channels_last(self, few, net):
        learn,spy = digits_learner(few),Spy()
        learn.add_cb(ChannelsLast())
        fit(learn, cbs=[KD(copy.deepcopy(net), T=4., alpha=1), spy])
        for s in spy.steps: close(s.loss, kl(s.pred, ask(net, s.x), 4).mean(), rtol=1e-5)

# ---------------------------------------------------------------- names keep their promises
def test_names():
    "D11: documented losses exist, and two methods are two gradients; no mask that fails at large logits"
    for o in list_losses(): get_loss(o)
    g = torch.Generator().manual_seed(0)
    s,t,y = torch.randn(8,5,generator=g,requires_grad=True),torch.randn(8,5,generator=g),torch.arange(8)%5
    a,b = (torch.autograd.grad(get_loss(k)(s, t, y), s)[0].flatten() for k in ('dkd','nkd'))
    assert F.cosine_similarity(a, b, 0)<.99
    s,t = torch.tensor([[6000.,0.,1.]], dtype=torch.float64),torch.tensor([[6000.,1.,0.]], dtype=torch.float64)
    p,q = t[:,1:].softmax(1),s[:,1:].softmax(1)
    close(dkd_loss(s, t, torch.tensor([0]), alpha=1., beta=1., T=1.), (p*(p/q).log()).sum())

# ---------------------------------------------------------------- fits after fits, and where it is attached
class TestFits:
    def test_attached_either_way(self, few, net):
        "One loss, three ways to attach it"
        def run(how):
            kd = KD(net, alpha=.7)
            learn = digits_learner(few, cbs=[kd] if how=='init' else None)
            if how=='add': learn.add_cb(kd)
            reseed(few)
            fit(learn, 2, cbs=[kd] if how=='fit' else None)
            return weights(learn)
        a,b,c = map(run, ('init','add','fit'))
        assert torch.equal(a, b) and torch.equal(a, c)

    @pytest.mark.parametrize('at', ['fit','init'])
    def test_fine_tune(self, few, net, at):
        kd,spy = KD(net, T=4., alpha=.5),Spy()
        learn = digits_learner(few, cbs=kd if at=='init' else None, splitter=lambda m: L(m[:3],m[3:]).map(params))
        with learn.no_bar(), learn.no_logging(): learn.fine_tune(1, freeze_epochs=1, cbs=[spy]+([kd] if at=='fit' else []))
        assert len(spy.steps)==4
        for s in spy.steps: close(s.loss, .5*ce(s.pred, s.y[0])+.5*kl(s.pred, ask(net, s.x), 4).mean())
        assert learn.metrics.map(lambda m: m.name)==['accuracy']

    @pytest.mark.parametrize('at', ['fit','init'])
    def test_several_fits(self, few, net, at):
        "The same callback again, then without, then one-cycle"
        kd,spy = KD(net, T=4., alpha=.5),Spy()
        learn = digits_learner(few, cbs=kd if at=='init' else None)
        o = [kd] if at=='fit' else []
        fit(learn, 1, cbs=[spy]+o); fit(learn, 1, cbs=[spy]+o)
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1, 1e-2, cbs=[spy]+o)
        assert len(spy.steps)==6
        for s in spy.steps: close(s.loss, .5*ce(s.pred, s.y[0])+.5*kl(s.pred, ask(net, s.x), 4).mean())
        learn.remove_cb(kd)
        spy = Spy()
        fit(learn, 1, cbs=spy)
        for s in spy.steps: close(s.loss, ce(s.pred, s.y[0]))
        assert learn.recorder.metric_names==['epoch','train_loss','valid_loss','accuracy','time']

    def test_one_callback_two_learners(self, few, net):
        kd = KD(net)
        a,b = digits_learner(few),digits_learner(few)
        for l in (a,b):
            reseed(few)
            fit(l, 1, cbs=kd)
        assert torch.equal(weights(a), weights(b))

    @pytest.mark.parametrize('mid', [False,True])
    def test_deepcopy(self, few, net, mid):
        "A copy distils on, by itself"
        n = Count(net)
        learn,cp = digits_learner(few, cbs=KD(n, T=4., alpha=.5)),[]
        class Copy(Callback):
            order = 90
            def after_epoch(self): cp.append(copy.deepcopy(self.learn))
        fit(learn, 1, cbs=Copy() if mid else None)
        new = cp[0] if mid else copy.deepcopy(learn)
        if mid: new.remove_cb(new.copy)
        spy = Spy()
        n.n = 0
        was = weights(learn)
        fit(new, 1, cbs=spy)
        assert len(spy.steps)==2 and n.n>=2 and torch.equal(weights(learn), was)
        assert new.knowledge_distillation is not learn.knowledge_distillation and new.knowledge_distillation.learn is new
        for s in spy.steps: close(s.loss, .5*ce(s.pred, s.y[0])+.5*kl(s.pred, ask(net, s.x), 4).mean())
        if not mid: assert new.metrics.map(lambda m: m.name)==['accuracy']
        fit(learn, 1)

# ---------------------------------------------------------------- without labels
class TestUnlabelled:
    def dls(self, few, y):
        xy = few.train_ds
        x = torch.stack([few.train.after_item(o)[0] for o in xy])
        b = [(i,) for i in x] if not y else [(i,tensor(j)) for i,j in zip(x, [o[1] for o in xy])]
        return DataLoaders(DataLoader(b, bs=64, num_workers=0), DataLoader(b, bs=64, num_workers=0))

    def test_alpha_one(self, few, net):
        "The weights move, just as they do on the same images with labels and `alpha=1`"
        ws = []
        for y in (True,False):
            set_seed(0)
            learn = Learner(self.dls(few, y), tiny_cnn(), loss_func=CrossEntropyLossFlat(), opt_func=SGD)
            was,spy = weights(learn),Spy()
            fit(learn, 2, cbs=[KD(net, alpha=1, T=4.), spy])
            assert len(spy.steps)==4 and not torch.equal(weights(learn), was)
            for s in spy.steps: close(s.loss, kl(s.pred, ask(net, s.x), 4).mean())
            ws.append(weights(learn))
        close(*ws)
        assert torch.equal(*ws)

    def test_one_call_a_step(self, few, net):
        n = Count(net)
        spy = Spy(lambda l: n.n)
        learn = Learner(self.dls(few, False), tiny_cnn(), loss_func=CrossEntropyLossFlat())
        fit(learn, 1, cbs=[KD(n, alpha=1), spy])
        assert spy.steps[1].o-spy.steps[0].o==1

    @pytest.mark.parametrize('task', ['traits','center'])
    def test_other_tasks(self, tasks, task):
        dls,net = tasks[task]
        learn = Learner(self.dls(dls, False), tiny_cnn(c=get_c(dls)), loss_func=dls.loss_func)
        spy = Spy()
        fit(learn, 1, cbs=[KD(net, alpha=1, T=None), spy])
        for s in spy.steps: close(s.loss, bkl(s.pred, ask(net, s.x), BinaryKDLoss().T).mean() if task=='traits' else ((s.pred-ask(net, s.x)).double()**2).mean())

# ---------------------------------------------------------------- every end of a fit
class Fail(Callback):
    "Ends the second step"
    run_valid = False
    def __init__(self, ex): self.ex = ex
    def before_step(self):
        if self.learn.iter==1: raise self.ex

class Bomb(nn.Module):
    "Does nothing until it is armed"
    armed = None
    def forward(self, x):
        if self.armed is not None and self.training:
            self.armed -= 1
            if self.armed<0: raise RuntimeError('out of memory')
        return x

class Nan(nn.Module):
    "A teacher that is right at first and NaN at the second batch of a fit"
    def __init__(self, m): super().__init__(); self.m,self.left = m,None
    def forward(self, *x):
        if self.left is not None: self.left -= 1
        out = self.m(*x)
        return out*float('nan') if self.left is not None and self.left<0 else out

ends = ['clean','cancel','interrupt','model','ours']

def run_end(learn, end, t, bomb, cbs=()):
    "Fit with this end; what was raised"
    exs = dict(cancel=CancelFitException('stop'), interrupt=KeyboardInterrupt())
    fail = [Fail(exs[end])] if end in exs else []
    class Arm(Callback):
        run_valid = False
        def before_batch(self):
            if self.learn.iter==1:
                if end=='ours': t.left = 0
                if end=='model': bomb.armed = 0
    try: fit(learn, 2, cbs=[*cbs, *fail, Arm()])
    except (KeyboardInterrupt,RuntimeError,ValueError) as e: return e
    finally: t.left,bomb.armed = None,None

def state(learn, t): return dict(metrics=[id(m) for m in learn.metrics], loss=id(learn.loss_func), cbs=[id(o) for o in learn.cbs if not isinstance(o, ProgressCallback)], hooks=hook_count(learn.model, t), modes=[m.training for m in t.modules()],
    grads=[p.grad is None for p in t.parameters()], req=[p.requires_grad for p in t.parameters()], t=[hash(v.numpy().tobytes()) for v in t.state_dict().values()])

class TestEnds:
    @pytest.mark.parametrize('at', ['fit','init'])
    @pytest.mark.parametrize('end', ends)
    def test_as_before(self, few, net, end, at):
        t,bomb = Nan(copy.deepcopy(net)),Bomb()
        t.train()
        t.m[0].eval()
        set_seed(0)
        kd = KD(t)
        learn = Learner(few, nn.Sequential(bomb, *tiny_cnn()), metrics=accuracy, cbs=kd if at=='init' else None)
        was = state(learn, t)
        e = run_end(learn, end, t, bomb, [kd] if at=='fit' else [])
        assert {'interrupt':KeyboardInterrupt, 'model':RuntimeError, 'ours':ValueError}.get(end, type(None)) is type(e)
        # fastai tells a Learner's own callbacks nothing about an interrupt: they clean up when it is next used
        if at=='init' and end in ('interrupt','model'):
            now = state(learn, t)
            for k in ('loss','cbs','hooks','grads','req','t'): assert now[k]==was[k], k
            learn.validate()
        now = state(learn, t)
        for k in was: assert now[k]==was[k], k
        assert len(learn.validate())==2
        assert (kd.learn is None)==(at=='fit')
        # and it goes on
        spy = Spy()
        fit(learn, 1, cbs=[spy]+([kd] if at=='fit' else []))
        for s in spy.steps: close(s.loss, .5*ce(s.pred, s.y[0])+.5*kl(s.pred, ask(t, s.x), KDLoss().T).mean(), rtol=1e-5)
        assert not hook_count(learn.model, t)

    @pytest.mark.parametrize('end', ends)
    def test_mixup(self, few, net, end):
        "MixUp swaps the loss function; our own error must not leave it swapped"
        t,bomb = Nan(copy.deepcopy(net)),Bomb()
        learn = Learner(few, nn.Sequential(bomb, *tiny_cnn()), metrics=accuracy)
        lf = learn.loss_func
        run_end(learn, end, t, bomb, [KD(t), MixUp()])
        if end in ('clean','cancel','ours'): assert learn.loss_func is lf
        learn.loss_func = lf
        assert learn.metrics.map(lambda m: m.name)==['accuracy']

    def test_many_interrupts(self, few, net):
        "D8: nothing piles up"
        t,bomb = Nan(copy.deepcopy(net)),Bomb()
        learn = Learner(few, nn.Sequential(bomb, *tiny_cnn()), metrics=accuracy, cbs=KD(t))
        for end in ('interrupt','model','ours','interrupt'): run_end(learn, end, t, bomb)
        pickle.dumps(learn.model)
        assert not hook_count(learn.model, t) and len(learn.metrics)<=3
        learn.validate()
        assert len(learn.metrics)==1

# ---------------------------------------------------------------- exports
@pytest.fixture(scope='module')
def frame():
    rng = np.random.RandomState(0)
    df = pd.DataFrame(dict(a=rng.randn(200), b=rng.randn(200), k=rng.choice(list('xyz'), 200)))
    df['y'] = np.where(df.a+df.b>0, 'pos', 'neg')
    return df
def tab_dls(df, block=None, y='y'): return TabularPandas(df, [Categorify,Normalize], ['k'], ['a','b'], y_names=y, y_block=block or CategoryBlock(), splits=(list(range(150)),list(range(150,200)))).dataloaders(bs=50, num_workers=0)
def tab_learner(dls, layers=(8,), **kwargs):
    set_seed(0)
    return tabular_learner(dls, layers=list(layers), metrics=accuracy, **kwargs)

class TabBomb(nn.Module):
    def __init__(self, m, bomb): super().__init__(); self.m,self.b = m,bomb
    def forward(self, a, b): return self.m(self.b(a), b)

load = '''
import sys,warnings
warnings.filterwarnings('ignore')
class Block:
    def find_spec(self, name, *args):
        if name.split('.')[0]=='fastkd': raise ImportError('fastkd is not installed here')
sys.meta_path.insert(0, Block())
try: import fastkd
except ImportError: pass
else: sys.exit('not blocked')
from fastai.tabular.all import *
df,ref = pd.read_pickle('df.pkl'),torch.load('ref.pt')
for f in sorted(Path('.').glob('*.pkl')):
    if f.name=='df.pkl': continue
    learn = load_learner(f)
    assert 'fastkd' not in sys.modules and 'teacher' not in vars(learn)
    with learn.no_bar(): p = learn.get_preds(dl=learn.dls.test_dl(df))[0]
    assert torch.equal(p, ref[f.stem]), f
    learn.dls = TabularPandas(df, [Categorify,Normalize], ['k'], ['a','b'], y_names='y', y_block=CategoryBlock(), splits=(list(range(150)),list(range(150,200)))).dataloaders(bs=50, num_workers=0)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    print(f.stem, len(learn.metrics))
'''

def test_export(frame, tmp_path):
    "D7: after any end, and amid a fit: as big as without the callback, and it loads where fastkd is not installed"
    dls,ref = tab_dls(frame),{}
    frame.to_pickle(tmp_path/'df.pkl')
    big = tab_learner(dls, (400,200)).model
    def save(learn, nm):
        learn.path = tmp_path
        with learn.no_bar(): ref[nm] = learn.get_preds(dl=learn.dls.test_dl(frame))[0]
        return nm
    plain = tab_learner(dls)
    fit(plain)
    save(plain, 'plain')
    plain.export(tmp_path/'plain.pkl')
    size = (tmp_path/'plain.pkl').stat().st_size
    assert sum(p.numel()*4 for p in big.parameters())>3*10**5
    for at in ('fit','init','mid'):
        for end in ends:
            if at=='mid' and end!='clean': continue
            t,nm = Nan(big),f'{at}_{end}'
            learn = tab_learner(dls)
            kd,bomb,body = KD(t),Bomb(),learn.model
            if at!='fit': learn.add_cb(kd)
            if at=='mid':
                class MidFit(Callback):
                    order = 90
                    def after_epoch(self):
                        l = self.learn
                        l.remove_cb(self)
                        l.export(tmp_path/f'{nm}.pkl')
                fit(learn, 1, cbs=MidFit())
            elif end=='model':
                fwd = body.forward
                body.forward = lambda *x: fwd(bomb(x[0]), x[1])
                bomb.train()
                run_end(learn, end, t, bomb, [kd] if at=='fit' else [])
                del body.forward
            else: run_end(learn, end, t, bomb, [kd] if at=='fit' else [])
            # straight after the end, before anything could clean up
            if at!='mid': learn.export(tmp_path/f'{nm}.pkl')
            save(learn, nm)
            assert abs((tmp_path/f'{nm}.pkl').stat().st_size-size)<5000, nm
            assert learn.dls is dls
            fit(learn, 1)
    torch.save(ref, tmp_path/'ref.pt')
    r = subprocess.run([sys.executable, '-c', load], cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS':'1', 'MPLBACKEND':'agg'})
    assert r.returncode==0, r.stderr[-3000:]
    assert {o.split()[0] for o in r.stdout.splitlines() if o.strip()}>=set(ref)

# ---------------------------------------------------------------- other kinds of data
class TestTabular:
    @pytest.mark.parametrize('at', ['fit','init'])
    def test_classify(self, frame, at):
        "D12: several inputs"
        dls = tab_dls(frame)
        t = tab_learner(dls, (20,))
        fit(t)
        kd,spy = KD(t, T=2., alpha=.4),Spy()
        learn = tab_learner(dls, cbs=kd if at=='init' else None)
        fit(learn, 2, cbs=[spy]+([kd] if at=='fit' else []))
        assert len(spy.steps)==6 and len(spy.steps[0].x)==2
        for s in spy.steps: close(s.loss, .6*ce(s.pred, s.y[0].flatten().long())+.4*kl(s.pred, ask(t.model, s.x), 2).mean())
        learn.predict(frame.iloc[0])

    def test_regress(self, frame):
        df = frame.assign(y=(frame.a*2+frame.b).astype('float32'))
        dls = tab_dls(df, RegressionBlock())
        set_seed(0)
        t,learn = (tabular_learner(dls, layers=[n]) for n in (20,8))
        spy = Spy()
        fit(learn, cbs=[KD(t, alpha=.4), spy])
        for s in spy.steps: close(s.loss, .6*((s.pred.flatten()-s.y[0].flatten()).double()**2).mean()+.4*((s.pred-ask(t.model, s.x)).double()**2).mean(), rtol=1e-5)

    def test_vocab(self, frame):
        "A teacher with the classes the other way round"
        dls = tab_dls(frame)
        rev = tab_dls(frame, CategoryBlock(vocab=['pos','neg'], sort=False))
        assert list(rev.vocab)==['pos','neg'] and list(dls.vocab)==['neg','pos']
        t = tab_learner(rev, (20,))
        fit(t)
        spy = Spy()
        with pytest.warns(UserWarning, match='another order'): fit(tab_learner(dls), cbs=[KD(t, T=2., alpha=1), spy])
        for s in spy.steps: close(s.loss, kl(s.pred, ask(t.model, s.x).flip(1), 2).mean())

words = ['xxpad','good','bad','film','was','the','a','very']
def split(o): return o.split()
def is_good(o): return 'yes' if 'good' in o else 'no'
def text_dls(kind):
    rng = np.random.RandomState(0)
    txt = [' '.join(rng.choice(words[1:], 9)) for _ in range(40)]
    tfms = [[split, Numericalize(vocab=words)]]+([[is_good, Categorize()]] if kind=='classify' else [])
    ds = Datasets(txt, tfms, splits=(range(32),range(32,40)), dl_type=SortedDL if kind=='classify' else LMDataLoader)
    return ds.dataloaders(bs=8, before_batch=pad_input, num_workers=0) if kind=='classify' else ds.dataloaders(bs=4, seq_len=8, num_workers=0)
def text_learner(dls, kind, n_hid, **kwargs):
    set_seed(0)
    cfg = dict((awd_lstm_clas_config if kind=='classify' else awd_lstm_lm_config), emb_sz=6, n_hid=n_hid, n_layers=2)
    if kind=='classify': return text_classifier_learner(dls, AWD_LSTM, config=cfg, pretrained=False, n_out=2, loss_func=CrossEntropyLossFlat(), **kwargs)
    return language_model_learner(dls, AWD_LSTM, config=cfg, pretrained=False, **kwargs)

class TestText:
    def test_classify(self):
        "D12: a text model answers with a tuple"
        dls = text_dls('classify')
        t,learn,spy = text_learner(dls, 'classify', 8),text_learner(dls, 'classify', 4),Spy()
        fit(learn, 2, cbs=[KD(t, T=2., alpha=.4), spy])
        assert len(spy.steps)>=4
        for s in spy.steps:
            t.model.reset()
            # alpha and beta of RNNRegularizer are in what is minimised
            got = s.grad if not learn.cbs.filter(lambda o: isinstance(o, RNNRegularizer)) else None
            if got is not None: close(got, .6*ce(s.pred, s.y[0])+.4*kl(s.pred, ask(t.model, s.x)[0], 2).mean(), rtol=1e-5)
        assert learn.get_preds()[0].shape==(8,2)

    def test_regulariser(self):
        "RNNRegularizer's part is minimised, whole; shown is the sum of task and KD, as fastai shows the task alone"
        t = text_learner(text_dls('lm'), 'lm', 4)
        def run(*cbs):
            # fresh data: a language model's order of texts is shuffled in place
            spy,dls = Spy(),text_dls('lm')
            learn = text_learner(dls, 'lm', 4)
            reseed(dls)
            fit(learn, 1, lr=0., cbs=[*cbs, spy])
            return spy.steps
        t.model.reset()
        for a,b in zip(run(), run(KD(t, alpha=.3, T=2.))):
            assert torch.equal(a.x[0], b.x[0]) and torch.equal(a.pred, b.pred) and a.grad-a.loss>1e-4
            want = .7*ce(b.pred.flatten(0,1), b.y[0].flatten())+.3*kl(b.pred, ask(t.model, b.x)[0], 2, axis=-1).mean()
            close(b.grad, want+a.grad-a.loss, rtol=1e-5)
            close(b.loss, want, rtol=1e-5)

    def test_language_model(self):
        "Per token, over the last axis; the teacher's memory runs along with the batches and starts afresh with the epoch"
        dls = text_dls('lm')
        t,learn,spy = text_learner(dls, 'lm', 8),text_learner(dls, 'lm', 4),Spy(lambda l: l.epoch)
        learn.remove_cb(RNNRegularizer)
        fit(learn, 2, cbs=[KD(t, T=2., alpha=.4), spy])
        epoch = None
        for s in spy.steps:
            if s.epoch!=epoch: t.model.reset(); epoch = s.epoch
            close(s.loss, .6*ce(s.pred.flatten(0,1), s.y[0].flatten())+.4*kl(s.pred, ask(t.model, s.x)[0], 2, axis=-1).mean(), rtol=1e-5)
        learn.validate()
