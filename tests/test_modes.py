"Every way fastai trains, with a teacher: the loss of each batch is the formula by hand, and the mode does what it does without one"
import pytest
from fastai.vision.all import *
from fastkd.all import *
from fastkd.test_utils import *
from copy import deepcopy
import ast
from test_regressions import Bf16,Spy,ask,bkl,ce,close,few,fit,hook_count,kl,linear,net,quiet,reseed,tasks,teach,weights

# fastai brings fastcore's test helpers, which pytest would take for tests
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]
pytestmark = pytest.mark.filterwarnings('ignore')
KD = KnowledgeDistillation
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')

def formula(spy, net, alpha=.5, T=5., task=lambda s: ce(s.pred, s.y[0]), tol=1e-5):
    "Each step's loss is the formula on that batch"
    assert spy.steps
    for s in spy.steps:
        a = alpha(s.pct) if callable(alpha) else alpha
        close(s.loss, (1-a)*task(s)+a*kl(s.pred, ask(net, s.x), T).mean(), rtol=tol, atol=tol)

def items(x, y, bs=64):
    "`DataLoaders` of pairs"
    b = [(i,j) for i,j in zip(x, y)]
    return DataLoaders(DataLoader(b, bs=bs, num_workers=0), DataLoader(b, bs=bs, num_workers=0))
def images(dls):
    dl = dls.train.new(shuffle=False)
    x,y = [torch.cat(o).as_subclass(Tensor) for o in zip(*dl)]
    return x,y

# ---------------------------------------------------------------- ways to fit
fits = dict(fit=lambda l, **kw: l.fit(4, 1e-2, **kw), fit_one_cycle=lambda l, **kw: l.fit_one_cycle(4, 1e-2, **kw), fit_flat_cos=lambda l, **kw: l.fit_flat_cos(4, 1e-2, **kw),
    fit_sgdr=lambda l, **kw: l.fit_sgdr(2, 1, 1e-2, cycle_mult=3, **kw), fine_tune=lambda l, **kw: l.fine_tune(3, 1e-2, freeze_epochs=1, **kw))

class Hypers(Callback):
    run_valid = False
    def __init__(self): self.o = []
    def after_loss(self): self.o.append([{k:float(h[k]) for k in ('lr','mom','wd')} for h in self.learn.opt.hypers])

class TestFits:
    @pytest.mark.parametrize('nm', fits)
    def test_loss_and_schedule(self, few, net, nm):
        "Our schedule follows the place in this fit; learning rates are those without a teacher"
        alpha,hypers = SchedLin(.9,.1),[]
        for cbs in ([],[KD(net, T=4., alpha=alpha)]):
            learn,spy,h = digits_learner(few, splitter=lambda m: L(m[:3],m[3:]).map(params)),Spy(),Hypers()
            quiet(learn, fits[nm], learn, cbs=[*cbs,spy,h])
            hypers.append(h.o)
        assert hypers[0]==hypers[1] and len(spy.steps)==8
        formula(spy, net, alpha, 4.)
        pct = [i/8 for i in range(8)] if nm!='fine_tune' else [0,1/2,*[i/6 for i in range(6)]]
        close([s.pct for s in spy.steps], pct)

    def test_loss_never_moves_the_teacher(self, few, net):
        was = deepcopy(net.state_dict())
        for f in fits.values():
            learn = digits_learner(few, cbs=KD(net))
            quiet(learn, f, learn)
        for k,v in net.state_dict().items(): assert torch.equal(v, was[k]), k

# ---------------------------------------------------------------- what the task loss may be
class TestTaskLosses:
    def run(self, learn, net, task, cbs=(), tol=1e-5, f=kl, **kw):
        spy = Spy()
        fit(learn, 2, cbs=[KD(net, T=3., alpha=.4, **kw), spy, *L(cbs)])
        assert len(spy.steps)==4
        for s in spy.steps: close(s.loss, .6*task(s)+.4*f(s.pred, ask(net, s.x), 3).mean(), rtol=tol, atol=tol)
        return spy

    @pytest.mark.parametrize('lf', [CrossEntropyLossFlat,nn.CrossEntropyLoss])
    def test_class_weights(self, few, net, lf):
        "They weigh the labels; the teacher's answers count alike"
        w = torch.linspace(.1, 3, 10)
        def task(s):
            l = F.cross_entropy(s.pred.double(), s.y[0].as_subclass(Tensor), weight=w.double(), reduction='none')
            return l.sum()/w.double()[s.y[0].as_subclass(Tensor)].sum()
        self.run(digits_learner(few, loss_func=lf(weight=w)), net, task)

    def test_pos_weight(self, tasks):
        dls,net = tasks['traits']
        w = tensor([.5,2.,5.])
        def task(s):
            p,y = s.pred.double().sigmoid(),s.y[0].double()
            return -(w.double()*y*p.log()+(1-y)*(1-p).log()).mean()
        self.run(digits_learner(dls, loss_func=BCEWithLogitsLossFlat(pos_weight=w)), net, task, f=bkl)

    def test_focal(self, few, net):
        def task(s):
            l = ce(s.pred, s.y[0], reduction='none')
            return ((1-(-l).exp())**2*l).mean()
        self.run(digits_learner(few, loss_func=FocalLossFlat(gamma=2.)), net, task)

    def soft(self, few):
        x,y = images(few)
        return items(x, .8*F.one_hot(y, 10).float()+.02)
    def test_soft_labels(self, few, net):
        set_seed(0)
        learn = Learner(self.soft(few), tiny_cnn(), loss_func=nn.CrossEntropyLoss())
        spy = self.run(learn, net, lambda s: -(s.y[0].double()*s.pred.double().log_softmax(1)).sum(1).mean())
        assert spy.steps[0].y[0].shape==(64,10)
    def test_soft_labels_mixed(self, few, net):
        "MixUp mixes labels that are vectors, and leaves the loss alone"
        learn = Learner(self.soft(few), tiny_cnn(), loss_func=nn.CrossEntropyLoss())
        spy = self.run(learn, net, lambda s: -(s.y[0].double()*s.pred.double().log_softmax(1)).sum(1).mean(), cbs=MixUp())
        assert ((spy.steps[0].y[0]>.03)&(spy.steps[0].y[0]<.8)).any()
    @pytest.mark.parametrize('loss', ['dkd','nkd'])
    def test_soft_labels_for_a_loss_of_classes(self, few, net, loss):
        learn = Learner(self.soft(few), tiny_cnn(), loss_func=nn.CrossEntropyLoss())
        was = weights(learn)
        with pytest.raises((ValueError,TypeError), match='label|targ|class'): fit(learn, cbs=KD(net, loss))
        assert torch.equal(weights(learn), was)

    @pytest.mark.parametrize('mix', [MixUp,CutMix])
    @pytest.mark.parametrize('lf', ['smooth','weighted'])
    def test_mixed(self, few, net, mix, lf):
        set_seed(1)
        w,cb = torch.linspace(.1, 3, 10),mix()
        kw,lf = (dict(label_smoothing=.2),LabelSmoothingCrossEntropyFlat(eps=.2)) if lf=='smooth' else (dict(weight=w.double()),CrossEntropyLossFlat(weight=w))
        spy = Spy(lambda l: (cb.yb1[0].clone(),cb.lam.clone()))
        learn = digits_learner(few, loss_func=lf)
        fit(learn, 2, cbs=[cb, KD(net, T=3., alpha=.4), spy])
        for s in spy.steps:
            (y1,lam),one = s.o,lambda y: ce(s.pred, y, reduction='none', **kw)
            task = torch.lerp(one(y1), one(s.y[0]), lam.double().expand(len(y1))).mean()
            close(s.loss, .6*task+.4*kl(s.pred, ask(net, s.x), 3).mean(), rtol=1e-5, atol=1e-5)
        assert learn.loss_func is lf

    @pytest.mark.parametrize('mix', [MixUp,CutMix])
    def test_mixed_term(self, few, net, mix):
        "A Term that reads labels gets both, too, and the layers are those of the mixed batch"
        set_seed(1)
        cb,lf = mix(),get_loss('dkd')
        learn,spy = digits_learner(few),Spy(lambda l: (cb.yb1[0].clone(),cb.lam.clone()))
        model,xs = deepcopy(learn.model).train(),[]
        with Taps(net.eval(), '1') as tt: fit(learn, 1, cbs=[cb, KD(net, T=4., terms=[Term(lf, weight=.3), Term('at', '1', '1', weight=7.)]), spy])
        s = spy.steps[0]
        y,(y1,lam),t = s.y[0].as_subclass(Tensor),s.o,ask(net, s.x)
        lam = lam.expand(len(y))
        task = torch.lerp(ce(s.pred, y1, reduction='none'), ce(s.pred, y, reduction='none'), lam.double()).mean()
        one = lambda i, y: lf(s.pred[i:i+1], t[i:i+1], targ=y[i:i+1])
        dkd = sum(lam[i]*one(i, y)+(1-lam[i])*one(i, y1) for i in range(len(y)))/len(y)
        with torch.no_grad(), Taps(model, '1') as ts, Taps(net, '1') as tt:
            model(s.x[0].as_subclass(Tensor)); net(s.x[0].as_subclass(Tensor))
            at = get_loss('at')(ts.take()[0], tt.take()[0])
        close(s.loss, .5*task+.5*kl(s.pred, t, 4).mean()+.3*dkd+7*at, rtol=1e-5, atol=1e-5)

# ---------------------------------------------------------------- precision, memory format, compiled
class Scaled(Bf16):
    "`MixedPrecision(fp16)` on the CPU: its own events, with a `GradScaler` of the CPU"
    def __init__(self, **kwargs): self.kwargs = kwargs
    def before_fit(self): self.learn.scaler = torch.amp.GradScaler('cpu', **self.kwargs)
    def before_backward(self): self.learn.loss_grad = self.learn.scaler.scale(self.learn.loss_grad)
    def before_step(self):
        self.skipped = True
        self.learn.scaler.step(self)
        if self.skipped: raise CancelStepException()
    def after_step(self): self.learn.scaler.update()
    def after_fit(self): self.learn.scaler = None
    @property
    def param_groups(self): return self.learn.opt.param_groups
    def step(self, *args, **kwargs): self.skipped = False

class TestPrecision:
    @pytest.mark.parametrize('f', ['to_fp16','to_bf16'])
    @pytest.mark.skipif(torch.cuda.is_available(), reason='what fastai does without a GPU')
    def test_without_a_gpu(self, few, net, f):
        "fastai's mixed precision is of the GPU: without one it trains in float32, and so does the teacher"
        ws = []
        for o in (noop,lambda l: getattr(l, f)()):
            learn,spy = digits_learner(few),Spy()
            reseed(few)
            o(learn)
            fit(learn, 2, cbs=[KD(net), spy])
            formula(spy, net)
            ws.append(weights(learn))
        assert torch.equal(*ws)

    @cuda
    @pytest.mark.parametrize('mode', ['fp16','bf16'])
    def test_gpu(self, net, mode):
        "Both models under autocast, the loss in float32, and the terms' adapters step by the scaler"
        dls,t = digits_dls(128),deepcopy(net)
        learn,kd = digits_learner(dls, cbs=MixedPrecision(amp_mode=mode)),KD(t, terms=Term('hint', '2', '2', weight=0.))
        dtypes = []
        spy = Spy(lambda l: (l.loss.dtype,torch.is_autocast_enabled('cuda')))
        fit(learn, 3, cbs=[kd, spy])
        for s in spy.steps:
            with torch.autocast('cuda', getattr(torch, {'fp16':'float16'}.get(mode, 'bfloat16'))): z = ask(t, s.x)
            assert z.dtype!=torch.float32 and s.o==(torch.float32,True)
            close(s.loss, (.5*ce(s.pred, s.y[0])+.5*kl(s.pred, z, 5).mean()).cpu(), rtol=1e-3, atol=1e-3)
        assert weights(learn).isfinite().all() and all(p.isfinite().all() for p in kd.terms.opt.params)

    def test_bf16_term(self, few, net):
        "A layer in bf16 is compared in float32"
        learn,spy = digits_learner(few),Spy()
        model = deepcopy(learn.model).train()
        fit(learn, 1, lr=0., cbs=[Bf16(), KD(net, alpha=.4, terms=Term('at', '1', '1', weight=5.)), spy])
        s = spy.steps[0]
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16), Taps(model, '1') as ts, Taps(net.eval(), '1') as tt:
            z,t = [m(s.x[0].as_subclass(Tensor)) for m in (model,net)]
            at = get_loss('at')(ts.take()[0], tt.take()[0])
        assert z.dtype==t.dtype==torch.bfloat16 and torch.equal(z.float(), s.pred.as_subclass(Tensor))
        close(s.loss, .6*ce(z, s.y[0])+.4*kl(z, t, 5).mean()+5*at, rtol=1e-5)

    @pytest.mark.parametrize('acc', [64,128])
    def test_scaled(self, few, net, acc):
        "A loss scale (and accumulation under it) changes neither the student's nor the adapters' steps"
        res = []
        for o in ([],[Scaled(init_scale=2.**12)]):
            learn,kd = linear(few, opt_func=SGD),KD(net, terms=Term('hint', '1', '4', weight=.1))
            reseed(few)
            learn.model.load_state_dict({k:torch.full_like(v, .01) for k,v in learn.model.state_dict().items()})
            if o: o[0].before_batch = o[0].after_loss = o[0].after_pred = noop
            fit(learn, 2, lr=.1, cbs=[*o, kd, GradientAccumulation(acc)])
            res.append([*learn.model.parameters(),*kd.terms.opt.params])
        for a,b in zip(*res): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)

    def test_skipped_step(self, few, net):
        "Gradients that overflow move neither the student nor the adapters; the next step is clean"
        class Inf(Callback):
            run_valid,order = False,MixedPrecision.order-.5
            def before_backward(self):
                if self.learn.train_iter==1: self.learn.loss_grad = self.learn.loss_grad*float('inf')
        seen = []
        class See(Callback):
            run_valid,order = False,90
            def after_batch(self): seen.append([p.detach().clone() for p in (*self.learn.model.parameters(),*kd.terms.opt.params)])
        learn,kd = linear(few),KD(net, terms=Term('hint', '1', '4'))
        fit(learn, 2, cbs=[Scaled(), kd, Inf(), See()])
        same = [all(torch.equal(a, b) for a,b in zip(*o)) for o in zip(seen, seen[1:])]
        assert same==[True,False,False] and all(o.isfinite().all() for o in seen[-1])

class TestFormats:
    def test_channels_last(self, few, net):
        "The teacher goes with the student"
        learn,t,spy,lay = digits_learner(few),deepcopy(net),Spy(),[]
        class See(Callback):
            def after_loss(self): lay.extend(m[1][0].weight.is_contiguous(memory_format=torch.channels_last) for m in (self.learn.model,t))
        learn.to_channelslast(use_amp=False)
        assert not t[1][0].weight.is_contiguous(memory_format=torch.channels_last)
        fit(learn, 2, cbs=[KD(t, terms=Term('at', '1', '1', weight=0.)), spy, See()])
        assert lay and all(lay)
        formula(spy, net)

class TestCompiled:
    def make(self, few, how, backend='eager'):
        torch.compiler.reset()
        learn = digits_learner(few)
        if how=='module': learn.model = torch.compile(learn.model, backend=backend)
        else: learn.model.compile(backend=backend)
        return learn
    @pytest.mark.parametrize('how', ['module','in place'])
    def test_values(self, few, net, how):
        "Compiled, each step is that of the same student as it was, layers included, in every epoch and fit"
        runs = []
        for make in (lambda: digits_learner(few),lambda: self.make(few, how)):
            learn,spy = make(),Spy()
            reseed(few)
            kd = KD(net, terms=Term('at', '1', '1', weight=5.))
            for _ in range(2): fit(learn, 2, cbs=[kd, spy])
            assert set(unwrap_model(learn.model).state_dict())==set(tiny_cnn().state_dict()) and not hook_count(unwrap_model(learn.model), net)
            runs.append(([s.loss for s in spy.steps],weights(learn) if how!='module' else torch.cat([p.detach().flatten() for p in unwrap_model(learn.model).state_dict().values()])))
        assert runs[0][0]==runs[1][0] and torch.equal(runs[0][1], runs[1][1]) and len(runs[0][0])==8

    def test_logits_then_layers(self, few, net):
        "A student that ran compiled before its layers were tapped: the first step says how to go on"
        learn,spy = self.make(few, 'module'),Spy()
        fit(learn, 1, cbs=[KD(net), spy])
        formula(spy, net)
        was = [p.detach().clone() for p in learn.model.parameters()]
        kd = KD(net, terms=Term('at', '1', '1'))
        with pytest.raises(ValueError, match=r'torch.compiler.reset\(\)'): fit(learn, 1, cbs=kd)
        assert all(torch.equal(a, b) for a,b in zip(was, learn.model.parameters()))
        torch.compiler.reset()
        fit(learn, 1, cbs=kd)
        assert np.isfinite(learn.recorder.values[-1]).all()

# ---------------------------------------------------------------- what happens around a step
class TestSteps:
    @pytest.mark.parametrize('opt_func', [SGD,Adam])
    def test_accumulated_adapters(self, few, net, opt_func):
        "Two batches of 64 accumulated are one of 128, for student and adapters"
        res = []
        for bs,cbs in ((128,[]),(64,[GradientAccumulation(128)])):
            dls = DataLoaders(few.train.new(bs=bs, shuffle=False, drop_last=True), few.valid)
            learn,kd = linear(dls, opt_func=opt_func),KD(net, terms=[Term('hint', '1', '4', weight=.5), Term('hint', '1', '2', weight=.1)])
            fit(learn, 3, lr=1e-2, cbs=[kd,*cbs])
            res.append([*learn.model.parameters(),*kd.terms.opt.params])
        assert len(res[0])==6
        for a,b in zip(*res): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize('cbs', [[],[Scaled]])
    @pytest.mark.parametrize('kw', [dict(max_norm=.01), dict(max_norm=.05, norm_type=1.), dict(max_norm=1e6)])
    def test_clipped_adapters(self, few, net, kw, cbs):
        "`GradientClip` holds for the adapters, by the same rule: their own norm is at most `max_norm`"
        res = []
        for clip in (False,True):
            learn,kd = linear(few, opt_func=partial(SGD, mom=0., wd=0.)),KD(net, terms=Term('hint', '1', '4', weight=30.))
            dls = DataLoaders(few.train.new(shuffle=False), few.valid)
            learn.dls = dls
            class Before(Callback):
                order,run_valid = 80,False
                def before_step(self):
                    if not hasattr(self, 'w'): self.w = [p.detach().clone() for p in kd.terms.opt.params]
                def after_batch(self):
                    if not hasattr(self, 'd'): self.d = [a-b.detach() for a,b in zip(self.w, kd.terms.opt.params)]
            o = Before()
            cb = [c(init_scale=2.**8) for c in cbs]
            for c in cb: c.before_batch = c.after_loss = c.after_pred = noop
            fit(learn, 1, lr=.5, cbs=[kd, o, *cb, *([GradientClip(**kw)] if clip else [])])
            res.append([g/.5 for g in o.d])
        free,got = res
        want = [nn.Parameter(g.clone()) for g in free]
        for p,g in zip(want, free): p.grad = g.clone()
        norm = nn.utils.clip_grad_norm_(want, **kw)
        assert norm>.1
        for a,b in zip(got, want): torch.testing.assert_close(a, b.grad, rtol=1e-3, atol=1e-5)

    def test_frozen_batchnorm(self, few, net):
        "`BnFreeze`: frozen layers keep their statistics, though preflight and terms ran them, too"
        learn,spy = digits_learner(few, splitter=lambda m: L(m[:2],m[2:]).map(params), train_bn=False),Spy()
        learn.freeze()
        was = deepcopy(learn.model.state_dict())
        fit(learn, 2, cbs=[KD(net, terms=Term('hint', '0', '0', weight=0.)), BnFreeze(), spy])
        formula(spy, net)
        for k,v in learn.model.state_dict().items(): assert torch.equal(v, was[k])==(k[0] in '01'), k

# ---------------------------------------------------------------- trackers and loggers
def says(capsys): return capsys.readouterr().out
columns = ['task_loss','kd_loss','at_loss']

def kd_at(net): return KD(net, terms=Term('at', '1', '1', weight=5., name='at_loss'))

class TestTrackers:
    @pytest.mark.parametrize('monitor', ['valid_loss',*columns])
    def test_reduce_lr(self, few, net, monitor):
        "What does not improve enough reduces the rate, ours and the adapters'"
        learn,h = digits_learner(few),Hypers()
        kd = KD(net, terms=Term('hint', '1', '1', weight=1., name='at_loss'))
        fit(learn, 4, lr=1e-3, cbs=[kd, ReduceLROnPlateau(monitor=monitor, patience=1, min_delta=100, factor=2), h])
        # the first epoch is the best there was
        close([o[0]['lr'] for o in h.o], np.repeat([1e-3,1e-3,5e-4,2.5e-4], 2))
        close(kd.terms.opt.opt.hypers[0]['lr'], 2.5e-4)

    @pytest.mark.parametrize('monitor', ['valid_loss',*columns])
    def test_best_and_stop(self, few, net, monitor, tmp_path):
        "The epoch that is kept is the best by the column as the table shows it"
        learn,ws = digits_learner(few, path=tmp_path),[]
        class See(Callback):
            order = 50.5
            def after_epoch(self): ws.append(weights(self.learn))
        fit(learn, 6, lr=.1, cbs=[kd_at(net), SaveModelCallback(monitor=monitor), EarlyStoppingCallback(monitor=monitor, patience=2), See()])
        vals = fit_table(learn)[monitor].tolist()
        assert torch.equal(weights(learn), ws[int(np.argmin(vals))])
        stop = next((i for i in range(len(vals)) if i>=2 and min(vals[i-1:i+1])>=min(vals[:i-1])), 5)
        assert len(vals)==stop+1

    def test_largest_loss(self, few, net):
        "fastai looks for the largest of what has no 'loss' in its name; `comp` turns it round"
        learn,ws = digits_learner(few),[]
        was,term = weights(learn),Term('at', '1', '1', weight=5.)
        for cb in (SaveModelCallback,EarlyStoppingCallback,ReduceLROnPlateau):
            with pytest.raises(ValueError, match="largest 'at'.*comp=np.less"): fit(learn, cbs=[KD(net, terms=term), cb(monitor='at')])
        assert torch.equal(weights(learn), was) and learn.metrics.map(lambda m: m.name)==['accuracy']
        fit(learn, 3, lr=0., cbs=[KD(net, terms=term), EarlyStoppingCallback(monitor='at', comp=np.less, min_delta=10)])
        assert learn.epoch==1
        # a metric of that name is no loss of ours
        fit(learn, 1, cbs=[KD(net), EarlyStoppingCallback(monitor='accuracy')])
    @pytest.mark.parametrize('monitor', ['valid_loss','kd_loss','at_loss'])
    def test_stays(self, few, net, monitor, tmp_path):
        "Trackers of the Learner rest where there is no column of ours to watch"
        learn = digits_learner(few, path=tmp_path, cbs=[kd_at(net), SaveModelCallback(monitor=monitor), EarlyStoppingCallback(monitor=monitor, patience=1, min_delta=100)])
        quiet(learn, learn.lr_find, num_it=12, show_plot=False)
        for _ in range(2):
            fit(learn, 4)
            assert learn.epoch==1
            assert len(quiet(learn, learn.validate))==2 and len(quiet(learn, learn.get_preds)[0])==599
            assert all(cb.run for cb in learn.cbs)
    def test_no_column(self, few, net):
        with pytest.raises(ValueError, match="'kd_loss'.*log=False"): fit(digits_learner(few), cbs=[KD(net, log=False), EarlyStoppingCallback(monitor='kd_loss')])

    def test_before_the_window(self, few, net):
        "A column is nan where there is no distillation, which no tracker takes for progress"
        learn = digits_learner(few)
        fit(learn, 4, lr=1e-3, cbs=[KD(net, start=2), EarlyStoppingCallback(monitor='kd_loss', patience=3)])
        assert fit_table(learn).kd_loss.isna().tolist()==[True,True,False,False]

    def test_nan_ends(self, few, net):
        learn,spy = digits_learner(few),Spy()
        class Boom(Callback):
            run_valid = False
            def after_pred(self):
                if self.learn.train_iter==2: self.learn.pred = self.learn.pred*float('nan')
        fit(learn, 3, cbs=[KD(net), TerminateOnNaNCallback(), Boom(), spy])
        assert len(spy.steps)==3 and learn.metrics.map(lambda m: m.name)==['accuracy'] and not hook_count(learn.model, net)

class TestLoggers:
    def rows(self, learn): return fit_table(learn).astype(float)
    def test_printed(self, few, net, capsys):
        learn = digits_learner(few)
        learn.fit(2, 1e-2, cbs=KD(net))
        lines = [l.split() for l in says(capsys).splitlines() if l.strip()]
        head = lines.index(['epoch','train_loss','valid_loss','accuracy','task_loss','kd_loss','time'])
        close([[float(v) for v in l[1:-1]] for l in lines[head+1:] if l[0] in '01' and len(l)==7], self.rows(learn).values, atol=1e-6, rtol=1e-5)
        with learn.no_bar():
            learn.fit(1, cbs=KD(net))
            assert len(ast.literal_eval(re.sub(r'\bnan\b', 'None', says(capsys).strip())))==7
            with learn.no_logging(): learn.fit(1, cbs=KD(net))
        assert not says(capsys)

    def test_train_metrics(self, few, net):
        "With metrics of both sets, ours have one value, of training"
        learn = digits_learner(few)
        learn.recorder.train_metrics = True
        fit(learn, 1, cbs=KD(net))
        t = self.rows(learn)
        assert 'train_accuracy' in t and t.train_kd_loss[0]==t.valid_kd_loss[0]
        learn.validate()

    def test_csv_append(self, few, net, tmp_path):
        learn = digits_learner(few, path=tmp_path)
        rows = []
        for i in range(2):
            fit(learn, 2, cbs=[kd_at(net), CSVLogger(append=i>0)])
            rows.append(self.rows(learn))
        df = pd.read_csv(tmp_path/'history.csv')
        # fastai writes the names again
        df = df[df.epoch!='epoch']
        close(df[['train_loss',*columns]].astype(float).values, pd.concat(rows)[['train_loss',*columns]].values)

    def test_show_graph(self, few, net, monkeypatch):
        learn,graphs = digits_learner(few),[]
        learn.progress  # the graph is drawn by the bar
        from fastprogress.fastprogress import MasterBar
        for c in {type(m) for m in (master_bar(range(1)),)}|{MasterBar}: monkeypatch.setattr(c, 'update_graph', lambda self, gs, *args: graphs.append([[list(map(float, o)) for o in g] for g in gs]), raising=False)
        with learn.no_logging(): learn.fit(2, 1e-2, cbs=[KD(net), ShowGraphCallback()])
        (_,train),(_,valid) = graphs[-1]
        close(train, [float(o) for o in learn.recorder.losses])
        close(valid, self.rows(learn).valid_loss)

    def test_plots(self, few, net):
        learn = digits_learner(few)
        quiet(learn, learn.fit_one_cycle, 2, 1e-2, cbs=KD(net))
        learn.recorder.plot_loss(); learn.recorder.plot_sched()
        plt.close('all')

    def test_tensorboard(self, few, net, tmp_path):
        pytest.importorskip('tensorboard')
        from fastai.callback.tensorboard import TensorBoardCallback
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        learn = digits_learner(few)
        fit(learn, 2, cbs=[kd_at(net), TensorBoardCallback(tmp_path/'tb', log_preds=False)])
        ea,t = EventAccumulator(str(tmp_path/'tb')),self.rows(learn)
        ea.Reload()
        for k in ('valid_loss',*columns): close([e.value for e in ea.Scalars(k)], t[k], rtol=1e-5)

    def test_wandb(self, few, net, tmp_path, monkeypatch):
        for k,v in dict(WANDB_MODE='offline', WANDB_SILENT='true', WANDB_DIR=tmp_path, WANDB_CACHE_DIR=tmp_path, WANDB_CONFIG_DIR=tmp_path, WANDB_DATA_DIR=tmp_path).items(): monkeypatch.setenv(k, str(v))
        wandb = pytest.importorskip('wandb')
        import fastai.callback.wandb as fw
        # with fastcore 2.2, writing the settings down fails, with a teacher or without
        monkeypatch.setattr(fw, '_format_config', noop)
        logged,learn = {},digits_learner(few)
        with wandb.init(project='fastkd', dir=tmp_path) as run:
            log = run.log
            monkeypatch.setattr(wandb, 'log', lambda d, **kw: logged.setdefault('rows', []).append(d) or log(d, **kw))
            fit(learn, 2, cbs=[kd_at(net), fw.WandbCallback(log_preds=False)])
            t,summary = self.rows(learn),dict(run.summary)
        rows = [d for d in logged['rows'] if 'valid_loss' in d]
        for k in ('valid_loss',*columns):
            close([d[k] for d in rows], t[k])
            close(summary[k], t[k].iloc[-1])
        assert list((tmp_path/'wandb').glob('offline-run-*'))

# ---------------------------------------------------------------- interrupted, and going on
class Stop(Callback):
    run_valid = False
    def __init__(self, at): self.at = at
    def before_step(self):
        if self.learn.train_iter==self.at: raise KeyboardInterrupt

class TestInterrupted:
    @pytest.mark.parametrize('at', ['fit','init'])
    @pytest.mark.parametrize('mix', [MixUp,CutMix])
    def test_mixup(self, few, net, at, mix):
        "fastai leaves the loss function swapped after Ctrl-C: we put it back, at once or when the Learner is next used"
        kd = KD(net)
        learn = digits_learner(few, cbs=kd if at=='init' else None)
        lf,cbs = learn.loss_func,[kd] if at=='fit' else []
        with pytest.raises(KeyboardInterrupt): fit(learn, 2, cbs=[*cbs, mix(), Stop(1)])
        if at=='init': quiet(learn, learn.validate)
        assert learn.loss_func is lf and learn.metrics.map(lambda m: m.name)==['accuracy'] and not hook_count(learn.model, net)
        spy = Spy()
        fit(learn, 1, cbs=[*cbs, spy])
        formula(spy, net)

    @pytest.mark.parametrize('where', [MixUp,GradientAccumulation])
    def test_error_elsewhere(self, few, net, where):
        class Boom(Callback):
            run_valid = False
            def before_step(self): raise RuntimeError('out of memory')
        learn = digits_learner(few)
        lf = learn.loss_func
        with pytest.raises(RuntimeError, match='out of memory'): fit(learn, 1, cbs=[where(), KD(net), Boom()])
        assert learn.loss_func is lf

class Seeds(Callback):
    "The same random numbers in an epoch whether those before it ran or not"
    order = -99
    def before_epoch(self): reseed(self.learn.dls, self.learn.epoch)

class SaveTerms(Callback):
    "As `SaveModelCallback(every_epoch=True)`, for what the callback trains beside the student"
    order = SaveModelCallback.order
    def __init__(self, kd, path): self.kd,self.path = kd,path
    def after_epoch(self): self.kd.save(self.path/f'kd_{self.learn.epoch}')

class TestResume:
    def make(self, few, net, path):
        learn = digits_learner(few, path=path)
        learn.model.insert(4, nn.Dropout(.2))
        return learn,KD(net, alpha=SchedLin(.9,.1), T=SchedLin(8,2), stop=.9, terms=Term('hint', '2', '2', name='hint_loss')),Spy()

    @pytest.mark.parametrize('nm', ['fit','fit_one_cycle','fit_sgdr'])
    @pytest.mark.parametrize('at', ['fit','init'])
    def test_start_epoch(self, few, net, tmp_path, nm, at):
        "A run that goes on from the files of epoch 1 is the run that was not interrupted: losses, student, adapters, optimizers, schedules"
        (a,kd,spy),ends = self.make(few, net, tmp_path),[]
        cbs = [Seeds(), spy]+([kd] if at=='fit' else [])
        if at=='init': a.add_cb(kd)
        quiet(a, fits[nm], a, cbs=[*cbs, SaveModelCallback(every_epoch=True, with_opt=True), SaveTerms(kd, tmp_path)])
        b,kd2,spy2 = self.make(few, net, tmp_path)
        if at=='init': b.add_cb(kd2)
        b.load('model_1', with_opt=True)
        kd2.load(tmp_path/'kd_1')
        quiet(b, fits[nm], b, start_epoch=2, cbs=[Seeds(), spy2]+([kd2] if at=='fit' else []))
        assert [s.pct for s in spy2.steps]==[4/8,5/8,6/8,7/8]
        close([s.loss for s in spy2.steps], [s.loss for s in spy.steps[4:]], rtol=1e-6)
        for x,y in zip(kd.terms.opt.params, kd2.terms.opt.params, strict=True): torch.testing.assert_close(x, y)
        torch.testing.assert_close(weights(a), weights(b))
        # all but `train_loss`, whose smoothing begins anew
        close(*[fit_table(o).iloc[2:,1:].astype(float).values for o in (a,b)], rtol=1e-5)

    def test_save_load(self, few, net, tmp_path):
        "`learn.save` holds the student alone, and `learn.load` goes on with it: optimizer included"
        learn = digits_learner(few, path=tmp_path, cbs=KD(net))
        fit(learn, 2)
        size = learn.save('a').stat().st_size
        plain = digits_learner(few, path=tmp_path)
        fit(plain, 2)
        assert abs(size-plain.save('b').stat().st_size)<500
        new = digits_learner(few, path=tmp_path)
        new.load('a')
        for l in (learn,new):
            reseed(few)
            fit(l, 1, cbs=[] if l is learn else KD(net))
        assert torch.equal(weights(learn), weights(new))
        # and without a teacher, from here
        plain.load('a')
        fit(plain, 1)

    def test_in_a_row(self, few, net):
        "Fits of other kinds one after another are each a fit of its own: schedules begin anew"
        learn,spy,alpha = digits_learner(few),Spy(),SchedLin(1.,.2)
        kd = KD(net, T=4., alpha=alpha)
        for f in (fits['fit'],fits['fit_flat_cos'],fits['fit_one_cycle']): quiet(learn, f, learn, cbs=[kd,spy])
        assert len(spy.steps)==24
        close([s.pct for s in spy.steps], [i/8 for i in range(8)]*3)
        formula(spy, net, alpha, 4.)
