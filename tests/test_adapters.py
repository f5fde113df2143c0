"Adapters: trained as the student is, in every way to train; and equal to torchdistill's modules where it has them"
from fastai.vision.all import *
from fastai.callback.fp16 import MixedPrecision
from fastkd.adapters import *
from fastkd.adapter_optim import *
from fastkd.taps import Taps
from fastkd.test_utils import *
from conftest import root
from copy import deepcopy
import subprocess,sys,textwrap
import pytest

# fastai brings fastcore's test helpers, which pytest would take for tests
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

pytestmark = pytest.mark.filterwarnings('ignore')

dls = digits_dls(100, bs=25)
teacher = tiny_cnn((8,16)).eval()

class Hint(Callback):
    "Trains the student towards the teacher's layer; the adapter has an optimizer of its own"
    order,run_valid = 5,False
    def __init__(self, adapter): self.a = AdapterOptim(adapter)
    def before_train(self):
        self.taps = [Taps(m, '1', detach=d).on() for m,d in ((self.learn.model,False),(teacher,True))]
        self.a.build(self.learn)
    def before_batch(self):
        for t in self.taps: t.arm()
    def after_loss(self):
        with torch.no_grad(): teacher(*self.xb)
        fs,ft = self.a.modules(*[t.take()[0] for t in self.taps])
        self.learn.loss_grad = self.loss_grad+F.mse_loss(fs.float(), ft.float())
        self.learn.loss = self.learn.loss_grad.clone()
    def after_step(self): self.a.step(self.learn)
    def after_train(self):
        for t in self.taps: t.off()

class InGroup(Hint):
    "The same, with the adapter in the student's last parameter group"
    def before_fit(self):
        ps,opt = list(self.a.modules.parameters()),self.learn.opt
        self.was = list(opt.param_lists[-1])
        opt.param_lists[-1] = L(self.was+ps)
        for p in ps:
            if p.ndim<2: opt.state[p]['do_wd'] = False
    def before_train(self): self.taps = [Taps(m, '1', detach=d).on() for m,d in ((self.learn.model,False),(teacher,True))]
    def after_step(self): pass
    def after_fit(self): self.learn.opt.param_lists[-1] = L(self.was)

class CPUMixed(MixedPrecision):
    "fastai's mixed precision, which knows CUDA only, with the same events on a CPU"
    def __init__(self, scale=2.**10): super().__init__(); self.scale = scale
    def before_fit(self):
        self.autocast,self.learn.scaler,self.scales = torch.autocast('cpu', torch.bfloat16),torch.amp.GradScaler('cpu', init_scale=self.scale),L()

def split(m): return L(m[:1],m[1:]).map(params)
def one_cycle(l, cb): l.fit_one_cycle(2, slice(1e-4,1e-2), cbs=cb)
def flat(l, cb): l.fit(2, 1e-2, wd=.1, cbs=cb)
def fine(l, cb): l.fine_tune(2, 1e-2, cbs=cb)
def twice(l, cb): l.fit_one_cycle(1, 1e-2, cbs=cb); l.fit(1, 1e-3, cbs=cb)
def frozen(l, cb): l.freeze(); l.fit(2, 1e-2, cbs=cb)

ways = dict(
    adam_one_cycle_slice=(one_cycle, {}, ()), sgd_momentum=(flat, dict(opt_func=partial(SGD, mom=.9)), ()), sgd=(flat, dict(opt_func=SGD), ()),
    accumulation=(one_cycle, {}, (lambda: GradientAccumulation(50),)), fine_tune=(fine, {}, ()), two_fits=(twice, {}, ()), frozen=(frozen, {}, ()),
    ranger=(flat, dict(opt_func=ranger), ()),
    scaled=(one_cycle, {}, (CPUMixed,)), scaled_overflow=(flat, {}, (lambda: CPUMixed(2.**127),)),
    scaled_accumulation=(one_cycle, {}, (CPUMixed,lambda: GradientAccumulation(50))))

def run(cls, way, kw, cbs):
    learn = digits_learner(dls, (4,8), splitter=split, **kw)
    a = make_adapter((25,8,4,4), (25,16,4,4), seed=0)
    learn.add_cbs([f() for f in cbs])
    with learn.no_bar(), learn.no_logging(): way(learn, cls(a))
    return [p.detach() for p in (*learn.model.parameters(),*a.parameters(),*a.buffers())]

@pytest.mark.parametrize('nm', ways)
def test_as_in_the_last_group(nm):
    way,kw,cbs = ways[nm]
    own,ref,start = run(Hint, way, kw, cbs),run(InGroup, way, kw, cbs),make_adapter((25,8,4,4), (25,16,4,4), seed=0)
    assert not any(torch.equal(a, b) for a,b in zip(own[-6:-3], start.parameters())), 'the adapter was not trained'
    assert all(torch.equal(a, b) for a,b in zip(own, ref)), max((a-b).abs().max().item() for a,b in zip(own, ref))

def test_torch_optimizer():
    "An adapter under torch's AdamW, against AdamW on the adapter alone with the same gradients"
    learn = digits_learner(dls, (4,8), opt_func=partial(OptimWrapper, opt=torch.optim.AdamW))
    a = make_adapter((25,8,4,4), (25,16,4,4), seed=0)
    b = deepcopy(a)
    opt = torch.optim.AdamW(b.parameters(), lr=1e-3)
    class Mirror(Hint):
        def after_step(self):
            for p,q in zip(a.parameters(), b.parameters()): q.grad = p.grad.clone()
            g = self.learn.opt.opt.param_groups[-1]
            for k in ('lr','betas','weight_decay','eps'): opt.param_groups[0][k] = g[k]
            opt.step()
            super().after_step()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(2, 1e-2, cbs=Mirror(a))
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))

def test_overflow_skips_both():
    learn = digits_learner(dls, (4,8))
    a = make_adapter((25,8,4,4), (25,16,4,4), seed=0)
    before = deepcopy(list(a.parameters()))
    mp = CPUMixed(float('inf'))
    learn.add_cb(mp)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=Hint(a))
    assert len(mp.scales or [])==0 and all(torch.equal(p, q) and p.grad is None for p,q in zip(a.parameters(), before))

def test_lr_find_and_checkpoints(tmp_path):
    learn = digits_learner(dls, (4,8), path=tmp_path)
    cb = Hint(make_adapter((25,8,4,4), (25,16,4,4), seed=0))
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, 1e-2, cbs=[cb,SaveModelCallback(with_opt=True)])
        sd = deepcopy(cb.a.state_dict())
        with learn.added_cbs(cb), cb.a.preserved(): learn.lr_find(num_it=5, show_plot=False)
    def same(x, y):
        if isinstance(x, dict): return x.keys()==y.keys() and all(same(x[k], y[k]) for k in x)
        if isinstance(x, list): return len(x)==len(y) and all(map(same, x, y))
        return torch.equal(x, y) if isinstance(x, Tensor) else x==y
    assert same(sd, cb.a.state_dict())
    learn.save('m'); learn.load('m'); learn.export('e.pkl')
    assert set(learn.model.state_dict())==set(tiny_cnn((4,8)).state_dict())
    torch.save(sd, tmp_path/'a.pth')
    assert same(torch.load(tmp_path/'a.pth', weights_only=True), sd)

def test_inactive_adapter_stands_still():
    "Between its gradients an adapter does not move, neither by momentum nor by decay"
    learn = digits_learner(dls, (4,8)); learn.create_opt()
    m = make_adapter((2,4),(2,8), seed=0)
    a = AdapterOptim(m).build(learn)
    def grad(): m(torch.rand(2,4), torch.rand(2,8))[0].sum().backward()
    grad(); a.step(learn)
    w = m.student.weight.clone()
    for _ in range(3): a.step(learn)
    assert torch.equal(m.student.weight, w)
    grad(); a.step(learn)
    assert not torch.equal(m.student.weight, w)

ddp = '''
    import sys,torch,torch.distributed as dist
    from fastai.vision.all import *
    from fastkd.adapters import *
    from fastkd.adapter_optim import *
    from fastkd.test_utils import *
    rank,store = int(sys.argv[1]),sys.argv[2]
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=rank, world_size=2)
    learn = digits_learner(digits_dls(100)); learn.create_opt()
    learn.model = nn.parallel.DistributedDataParallel(learn.model)
    for sync in (True,False):
        torch.manual_seed(rank)
        a = make_adapter((8,4,4,4),(8,6,4,4))
        o = AdapterOptim(a)
        if not sync: o.broadcast = o._sync = lambda: None
        o.build(learn)
        for i in range(4):
            fs,ft = a(torch.rand(8,4,4,4), torch.rand(8,6,4,4))
            (fs-ft).pow(2).mean().backward()
            if i==0 and rank==1: a.student[1].bias.grad = None
            o.step(learn)
        w = torch.cat([p.detach().flatten() for p in a.parameters()])
        both = [torch.zeros_like(w) for _ in range(2)]
        dist.all_gather(both, w)
        if rank==0: print((both[0]-both[1]).abs().max().item())
    dist.destroy_process_group()'''

def test_two_processes(tmp_path):
    "With one start and averaged gradients both processes keep one adapter; without, they drift apart"
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'PYTHONPATH':str(root)}
    ps = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(ddp), str(r), str(tmp_path/'store')], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for r in range(2)]
    outs = [p.communicate(timeout=300) for p in ps]
    assert all(p.returncode==0 for p in ps), outs[0][1][-2000:]+outs[1][1][-2000:]
    synced,alone = map(float, outs[0][0].split()[-2:])
    assert synced==0<alone

def test_needs_no_fastai():
    r = subprocess.run([sys.executable, '-c', "import sys,fastkd.adapters,fastkd.adapter_optim; print({'fastai','torchvision'}&set(sys.modules))"], env={**os.environ, 'PYTHONPATH':str(root)}, capture_output=True, text=True)
    assert r.stdout.strip()=='set()', r.stderr

# -- against the published forms

def copy_(mine, theirs):
    a,b = [[v for k,v in m.state_dict().items() if v.ndim] for m in (mine,theirs)]
    assert [o.shape for o in a]==[o.shape for o in b]
    for p,q in zip(a, b): p.copy_(q)

def test_torchdistill():
    w = pytest.importorskip('torchdistill.models.wrapper')
    torch.manual_seed(0)
    x,y = torch.randn(4,6,8,8),torch.randn(4,5,4,4)
    p = Paraphraser(6, .5)
    copy_(p, td:=w.Paraphraser4FactorTransfer(.5, 6))
    assert torch.allclose(p.reconstruct(x), td(x), atol=1e-6) and torch.allclose(p(x), td.encoder(x), atol=1e-6)
    t = Translator(6, 3)
    copy_(t, td:=w.Translator4FactorTransfer(6, 3))
    assert torch.allclose(t(x), td(x), atol=1e-6)
    v,td = VIDRegressor(6, 9),w.Regressor4VID(6, 9, 9, 1e-5, 5.)
    for a,b in zip(v.mean.parameters(), td.regressor.parameters()): a.data.copy_(b)
    for rho in (v.rho.data,torch.randn(9)):
        v.rho.data.copy_(rho); td.soft_plus_param.data.copy_(rho)
        for a,b in zip(v(x), td(x)): assert torch.allclose(a, b.to(a.dtype), atol=1e-6)
    assert torch.allclose(VIDRegressor(6,9).rho, w.Regressor4VID(6, 9, 9, 1e-5, 5.).soft_plus_param.float())
    for fuse in (False,True):
        m,td = ABF(6, 5, 7, fuse),w.AttentionBasedFusion(6, 5, 7, fuse)
        for a,b in ((m.conv1,td.conv1),(m.conv2,td.conv2)): copy_(a, b)
        if fuse: copy_(m.att, td.attention_conv)
        for a,b in zip(m(x, y), td(x, y, 8)): assert torch.allclose(a, b, atol=1e-6)

def test_review_pyramid():
    "Against the authors' loop, written out"
    torch.manual_seed(0)
    fs,ft = [torch.randn(2,4,8,8),torch.randn(2,6,4,4),torch.randn(2,8,2,2)],[torch.randn(2,5,16,16),torch.randn(2,7,4,4),torch.randn(2,9,2,2)]
    a = make_adapter([f.shape for f in fs], [f.shape for f in ft], 'review')
    assert a.student[0].conv1[0].out_channels==8
    outs,_ = a(fs, ft)
    o2,r2 = a.student[2](fs[2])
    def fuse(m, x, r, size):
        x,r = m.conv1(x),F.interpolate(r, x.shape[2:], mode='nearest')
        z = m.att(torch.cat([x,r], 1))
        x = x*z[:,0].view(2,1,*x.shape[2:])+r*z[:,1].view(2,1,*x.shape[2:])
        if x.shape[2:]!=size: x = F.interpolate(x, size, mode='nearest')
        return m.conv2(x),x
    o1,r1 = fuse(a.student[1], fs[1], r2, (4,4))
    o0,_ = fuse(a.student[0], fs[0], r1, (16,16))
    for x,y in zip(outs, (o0,o1,o2)): assert torch.allclose(x, y, atol=1e-5)

def test_student_gets_the_gradient():
    for kind,(ss,ts) in {k:((6,4,4,4),(6,8,2,2)) for k in ('auto','space','none','tokens','conv','vid','ft','ab','srd','embed','pad','simkd')}.items():
        fs,ft = torch.randn(ss, requires_grad=True),torch.randn(ts)
        a = make_adapter(ss, ts, kind)
        s,_ = a(fs, ft)
        sum(o.pow(3).sum() for o in (s if isinstance(s, tuple) else (s,))).backward()
        assert torch.isfinite(fs.grad).all() and fs.grad.abs().sum()>0, kind
        assert all(p.grad is not None for p in a.student.parameters()), kind
