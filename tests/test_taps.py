"Taps in real networks: in-place residual blocks, wrappers, interrupted fits and exports"
from fastai.vision.all import *
from fastkd.taps import *
from fastkd.test_utils import *
from torchvision.models import resnet18,mobilenet_v2,VisionTransformer
import subprocess,sys,textwrap
import pytest

# fastai brings fastcore's test helpers, which pytest would take for tests
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

pytestmark = pytest.mark.filterwarnings('ignore')

def n_hooks(m): return sum(len(o._forward_hooks)+len(o._forward_pre_hooks) for o in m.modules())

def clones(model, x):
    "What every layer returned when it ran for the last time"
    res = {}
    hs = [m.register_forward_hook(lambda _,i,o,k=k: res.__setitem__(k, o.clone() if isinstance(o, Tensor) else o)) for k,m in model.named_modules()]
    model(x)
    for h in hs: h.remove()
    return {k:v for k,v in res.items() if isinstance(v, Tensor)}

def vit(): return VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4)

@pytest.mark.parametrize('arch', [resnet18,mobilenet_v2,vit])
def test_every_layer(arch):
    set_seed(0)
    model,x = arch(),torch.randn(2,3,32,32)
    for d in model.modules():
        if isinstance(d, nn.Dropout): d.p = 0.
        if isinstance(d, nn.modules.batchnorm._BatchNorm): d.momentum = 0.
    for mode in (False,True):
        model.train(mode)
        want = clones(model, x)
        with Taps(model, list(want)) as taps:
            for i in range(2):
                model(x)
                got = taps.take()
                for (k,w),g in zip(want.items(), got): assert torch.equal(g, w), (arch.__name__, mode, i, k)
        copied = [t.name for t in taps.taps if not t.safe[mode]]
        if arch is resnet18: assert 'layer1.0.bn2' in copied and 'bn1' in copied and 'layer1.0.conv1' not in copied and 'layer2' not in copied
        if arch is vit: assert not copied
    assert n_hooks(model)==0

def test_gradient_of_overwritten_layer():
    set_seed(0)
    model,x = resnet18().eval(),torch.randn(2,3,32,32)
    def grads(f): return torch.autograd.grad(f.pow(2).sum(), [model.conv1.weight,model.layer2[0].conv2.weight])
    want = grads(clones(model, x)['layer2.0.bn2'])
    with Taps(model, 'layer2.0.bn2') as taps:
        for _ in range(2):
            model(x)
            for a,b in zip(grads(taps.take()[0]), want): assert torch.equal(a, b)

def test_torchdistill_path():
    "`layer4.-1.relu`, whose input torchdistill gets after the activation"
    model = resnet18().eval()
    with Taps(model, ['layer4.-1.bn2','layer4']) as taps, torch.no_grad():
        model(torch.randn(2,3,32,32))
        bn,out = taps.take()
    assert bn.min()<0<=out.min()
    # the ReLU of a block runs twice: after the first convolution, and after the sum
    x = torch.randn(2,3,32,32)
    with Taps(model, ['layer4.-1.relu:input','layer4']) as last, Taps(model, ['layer4.-1.relu:input','layer4.-1.bn1'], call=0) as first_, torch.no_grad():
        model(x)
        pre,post = last.take()
        a,b = first_.take()
    assert torch.equal(pre.relu(), post) and pre.min()<0
    assert torch.equal(a, b) and a.min()<0

def test_amp_and_checkpoint():
    model,x = tiny_cnn(),torch.rand(4,1,8,8)
    with torch.autocast('cpu', torch.bfloat16), Taps(model, '1.0') as taps:
        model(x)
        assert taps.take()[0].dtype==torch.bfloat16
    from torch.utils.checkpoint import checkpoint
    want = torch.autograd.grad(model[1](model[0](x)).pow(2).sum(), model[0][0].weight)[0]
    class Ck(nn.Module):
        def __init__(self): super().__init__(); self.m = model
        def forward(self, x): return self.m[2:](checkpoint(self.m[:2], x, use_reentrant=False))
    with Taps(ck:=Ck(), 'm.1') as taps:
        ck(x)
        f = taps.take()[0]
        taps.disarm()
        assert torch.allclose(torch.autograd.grad(f.pow(2).sum(), model[0][0].weight)[0], want)
        assert taps.taps[0].kept==[]

class Grab(Callback):
    "Takes a layer as a distillation callback would"
    run_valid = False
    def __init__(self, layer, stop=None, exc=None): self.layer,self.stop,self.exc,self.seen = layer,stop,exc,0
    def before_train(self): self.taps = Taps(self.learn.model, self.layer, who='the student').on()
    def before_batch(self): self.taps.arm()
    def after_loss(self):
        f, = self.taps.take()
        self.taps.disarm()
        assert f.requires_grad
        self.seen += 1
        if self.seen==self.stop: raise self.exc
    def after_train(self): self.taps.off()

def fit(learn, cb, n=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, cbs=cb)

def test_fit():
    learn = digits_learner(digits_dls(100, bs=25))
    cb = Grab('1.1')
    fit(learn, cb, 2)
    assert cb.seen==8 and n_hooks(learn.model)==0

@pytest.mark.parametrize('exc', [CancelFitException(),CancelEpochException(),CancelBatchException(),KeyboardInterrupt(),ValueError('stop')])
def test_leaked_hook_is_inert(exc):
    learn = digits_learner(digits_dls(100, bs=25))
    cb = Grab('1.1', 2, exc)
    try: fit(learn, cb)
    except (KeyboardInterrupt,ValueError): pass
    learn.model(torch.rand(2,1,8,8))
    assert all(not t.kept for t in cb.taps.taps)
    cb.taps.off()
    assert n_hooks(learn.model)==0

def test_export_with_live_hooks(tmp_path):
    learn = digits_learner(digits_dls(100, bs=25), path=tmp_path)
    size = len((learn.export('plain.pkl'),(tmp_path/'plain.pkl').read_bytes())[1])
    with Taps(learn.model, ['0','1:input']) as taps:
        learn.model(torch.rand(64,1,8,8))
        learn.export('hooked.pkl')
    assert (tmp_path/'hooked.pkl').stat().st_size<size+1000
    code = f'''
        import sys
        class No:
            def find_spec(self, name, *a):
                if name=='fastkd.taps': raise ImportError(name)
        sys.meta_path.insert(0, No())
        from fastai.vision.all import *
        learn = load_learner({str(tmp_path/'hooked.pkl')!r})
        learn.model(torch.rand(2,1,8,8))
        print('loaded', 'fastkd.taps' in sys.modules)'''
    r = subprocess.run([sys.executable, '-W', 'ignore', '-c', textwrap.dedent(code)], capture_output=True, text=True)
    assert r.stdout.strip()=='loaded False', r.stderr[-2000:]

def test_ddp(tmp_path):
    import torch.distributed as dist
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        model,x = tiny_cnn(),torch.rand(4,1,8,8)
        ddp = nn.parallel.DistributedDataParallel(model)
        with Taps(ddp, ['1.1','module.0']) as taps:
            ddp(x)
            a,b = taps.take()
        assert taps.names==['1.1','0'] and a.requires_grad
        model.eval()
        with Taps(ddp, ['1.1']) as taps:
            ddp(x)
            assert torch.equal(taps.take()[0], model[1][1](model[1][0](model[0](x))))
    finally: dist.destroy_process_group()

def test_layers_of_changes_nothing():
    set_seed(0)
    learn = digits_learner(digits_dls(100, bs=25))
    model = learn.model.train()
    model[0].eval()
    before,modes,rng = {k:v.clone() for k,v in model.state_dict().items()},[m.training for m in model.modules()],torch.get_rng_state()
    py,np_ = random.getstate(),np.random.get_state()[1].copy()
    layers_of(learn); layers_of(torch.compile(model, backend='eager'), learn.dls)
    assert all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    assert [m.training for m in model.modules()]==modes and n_hooks(model)==0
    assert torch.equal(torch.get_rng_state(), rng) and random.getstate()==py and (np.random.get_state()[1]==np_).all()

def test_compiled_with_inductor():
    "Slow: only where asked for by FASTKD_SLOW=1"
    if not os.environ.get('FASTKD_SLOW'): pytest.skip('set FASTKD_SLOW=1')
    model,x = tiny_cnn().eval(),torch.rand(4,1,8,8)
    c = torch.compile(model)
    taps = Taps(c, ['0.1','1'])
    for _ in range(2):
        with taps:
            c(x)
            a,b = taps.take()
        assert torch.allclose(a, model[0][1](model[0][0](x)), atol=1e-5) and torch.allclose(b, model[1](model[0](x)), atol=1e-5)
