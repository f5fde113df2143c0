"Relational losses: the formulas as loops, torchdistill where it is installed, gradients, what each does not see, traps"
import inspect,math,pickle
from itertools import permutations
import pytest,torch,torch.nn.functional as F
import fastkd.losses.all
from fastkd.core import KDModule,get_loss
from fastkd.losses.relations import *

funcs = dict(rkd=rkd_loss, sp=sp_loss, pkt=pkt_loss, cc=cc_loss, cka=cka_loss, skd_direction=skd_direction_loss)
every = pytest.mark.parametrize('name', funcs)
close = torch.testing.assert_close

def make(n=7, ds=5, dt=9, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *((d,) if isinstance(d, int) else d), generator=g, dtype=torch.float64).to(dtype) for d in (ds,dt)]
def grad(f, s, *a):
    s = s.clone().requires_grad_()
    v = f(s, *a)
    return v.detach(),torch.autograd.grad(v, s)[0]
def turn(d, seed=3): return torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]

# ---------------------------------------------------------------- the formulas, as loops
def huber(a, b): return (a-b)**2/2 if abs(a-b)<1 else abs(a-b)-.5
def rkd_loop(s, t, w_d=1., w_a=2.):
    n,l = len(s),0.
    mu = [sum((e[i]-e[j]).norm() for i,j in permutations(range(n),2))/(n*(n-1)) for e in (s,t)]
    for i,j in permutations(range(n), 2): l += w_d*huber((s[i]-s[j]).norm()/mu[0], (t[i]-t[j]).norm()/mu[1])/n**2
    for j in range(n):
        for i,k in [(i,k) for i in range(n) for k in range(n) if j not in (i,k)]:
            l += w_a*huber(*[torch.dot(F.normalize(e[i]-e[j], dim=0), F.normalize(e[k]-e[j], dim=0)) for e in (s,t)])/n**3
    return l
def sp_loop(s, t, p=2):
    gs,gt = [torch.stack([torch.stack([u@v for v in e]) for u in e]) for e in (s.flatten(1),t.flatten(1))]
    return sum((gs[i]/gs[i].norm(p)-gt[i]/gt[i].norm(p)).pow(2).sum() for i in range(len(s)))/len(s)**2
def cosine(e, i, j): return e[i]@e[j]/(e[i].norm()*e[j].norm())
def pkt_loop(s, t, eps=1e-7):
    n,l = len(s),0.
    for i in range(n):
        ks,kt = [[(cosine(e,i,j)+1)/2 for j in range(n)] for e in (s,t)]
        for j in set(range(n))-{i}:
            p,q = kt[j]/(sum(kt)-kt[i]),ks[j]/(sum(ks)-ks[i])
            l += p*((p+eps)/(q+eps)).log()/n
    return l
def pkt_code(s, t, eps=1e-7):
    k = [torch.stack([torch.stack([u@v for v in e]) for u in e])/2+.5 for e in [o/(o.norm(dim=1,keepdim=True)+eps) for o in (s,t)]]
    q,p = [o/o.sum(1,keepdim=True) for o in k]
    return (p*((p+eps)/(q+eps)).log()).mean()
def cc_kernel(e, gamma=.4, P=2): return torch.stack([torch.stack([sum(math.exp(-2*gamma)*(2*gamma)**p/math.factorial(p)*(u@v)**p for p in range(P+1)) for v in e]) for u in e])
def cc_loop(s, t): return sum((a-b)**2 for a,b in zip(cc_kernel(F.normalize(s)).flatten(), cc_kernel(F.normalize(t)).flatten()))/len(s)**2
def cka_loop(s, t):
    n = len(s)
    h = torch.eye(n).to(s)-1/n
    hsic = lambda k,l: (k@h@l@h).trace()
    k,l = s@s.T,t@t.T
    return 1-hsic(k,l)/(hsic(k,k)*hsic(l,l)).sqrt()
def skd_loop(s, t, lam=.1, c=1):
    d = torch.stack([torch.stack([cosine(s,i,j)-cosine(t,i,j) for j in range(len(s))]) for i in range(len(s))])/c
    m = sum(r for r in d)/len(d)
    cov = sum(torch.outer(r-m, r-m) for r in d)/(len(d)-1)+lam*torch.eye(len(d)).to(d)
    return sum((r@torch.linalg.inv(cov)@r).sqrt() for r in d)/len(d)
loops = dict(rkd=rkd_loop, sp=sp_loop, pkt=pkt_loop, cc=cc_loop, cka=cka_loop, skd_direction=skd_loop)

@every
@pytest.mark.parametrize('seed', range(3))
def test_loop(name, seed):
    s,t = make(seed=seed)
    (v,g),(lv,lg) = grad(funcs[name], s, t),grad(loops[name], s, t)
    close(v, lv, rtol=1e-9, atol=1e-12)
    close(g, lg, rtol=1e-6, atol=1e-9)

@every
def test_maps_are_flattened(name):
    s,t = make(ds=(2,3,3), dt=(4,2,2))
    close(funcs[name](s, t), funcs[name](s.flatten(1), t.flatten(1)))

def test_modes_against_loops():
    s,t = make()
    close(sp_loss(s, t, mode='torchdistill'), sp_loop(s, t, 1))
    close(pkt_loss(s, t, mode='torchdistill'), pkt_code(s, t), rtol=1e-9, atol=0)
    close(cc_loss(s, t, mode='torchdistill'), (cc_kernel(s)-cc_kernel(t)).norm()/49)
    close(cc_loss(s, t, kernel='bilinear', mode='torchdistill'), (s@s.T-t@t.T).norm()/49)
    t = t[:,:5]
    conf = t.softmax(1).sum(0)
    close(skd_direction_loss(s, t, mode='code'), skd_loop(s, t, c=5)*(conf<=conf.quantile(.5)).double().mean())

# ---------------------------------------------------------------- torchdistill 1.1.5
def theirs(m, name):
    g = dict(type='gaussian', gamma=.4, max_p=2)
    return dict(rkd=lambda: m.RKDLoss('l', 'l', 1., 2., 'mean'), sp=lambda: m.SPKDLoss('l', 'l', 'batchmean'), pkt=lambda: m.PKTLoss('l', 'output', 'l', 'output'), cc=lambda: m.CCKDLoss('l', 'l', g, 'batchmean'),
        bilinear=lambda: m.CCKDLoss('l', 'l', dict(type='bilinear'), 'batchmean'), skd_paper=lambda: m.SKDDirectionLoss('l', 'output', 'l', 'output', .1, 'paper'), skd_code=lambda: m.SKDDirectionLoss('l', 'output', 'l', 'output', .1, 'code'))[name]()
ours = dict(rkd=RKDLoss(), sp=SPLoss(mode='torchdistill'), pkt=PKTLoss(mode='torchdistill'), cc=CCLoss(mode='torchdistill'), bilinear=CCLoss('bilinear', mode='torchdistill'),
    skd_paper=SKDDirectionLoss(), skd_code=SKDDirectionLoss(mode='code'))

@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64) # torchdistill makes its identity matrix in the default type
    yield
    torch.set_default_dtype(torch.float32)

@pytest.mark.parametrize('name', ours)
@pytest.mark.parametrize('n,shape', [(8,(12,)),(5,(3,4,4)),(2,(6,)),(33,(20,))])
def test_torchdistill(double, name, n, shape):
    m = pytest.importorskip('torchdistill.losses.mid_level')
    if len(shape)>1 and name not in ('rkd','sp'): shape = (math.prod(shape),)
    s,t = make(n, shape, shape if name=='skd_code' else (7,))
    l,io = theirs(m, name),lambda x: {'l':{'output':x}}
    (v,g),(tv,tg) = grad(ours[name], s, t),grad(lambda s: l(io(s), io(t)), s)
    close(v, tv, rtol=0, atol=1e-7)
    close(g, tg, rtol=0, atol=1e-7)

# ---------------------------------------------------------------- the contract
@every
def test_pair(name):
    l,f,(s,t) = get_loss(name),funcs[name],make()
    ps = {k:p.default for k,p in inspect.signature(f).parameters.items()}
    assert isinstance(l, KDModule) and type(l).func is f and list(ps)[:2]==['fs','ft'] and l.needs==()
    hypers = {k:v for k,v in ps.items() if k not in ('fs','ft')}
    assert hypers=={k:p.default for k,p in inspect.signature(type(l)).parameters.items()}=={k:getattr(l, k) for k in hypers} and hypers['reduction']=='mean'
    close(l(s, t), f(s, t))
    close(pickle.loads(pickle.dumps(l))(s, t), f(s, t))
    with pytest.raises(TypeError, match='no_such'): get_loss(name, no_such=1)

@every
def test_reductions(name):
    s,t = make()
    for kw in [{}]+[dict(mode=m) for m in ('torchdistill','code') if f"'{m}'" in inspect.getsource(funcs[name])]:
        each,mean,total = (funcs[name](s, t, reduction=r, **kw) for r in ('none','mean','sum'))
        assert each.shape==(7,) and (each>=-1e-6).all() or name in ('cka','pkt')
        close(each.mean(), mean); close(each.sum(), total)
    with pytest.raises(ValueError, match='avg'): funcs[name](s, t, reduction='avg')

@every
def test_lists(name):
    s,t = make()
    f = funcs[name]
    close(f([s,s[:,:3]], [t,t[:,2:]]), f(s, t)+f(s[:,:3], t[:,2:]))
    close(f((s,), (t,), reduction='none'), f(s, t, reduction='none'))
    for bad in (([s,s],[t]), ([s],t), (s,[t]), ([],[])):
        with pytest.raises(ValueError, match='equal length'): f(*bad)

@every
@pytest.mark.parametrize('n', [2,5])
def test_gradcheck(name, n):
    s,t = make(n, 4, 6)
    if name in ('cka','skd_direction') and n==2: return # CKA of two items is 1 whatever they are; the root of a difference near 0
    assert torch.autograd.gradcheck(lambda s: funcs[name](s, t, reduction='none'), (s.requires_grad_(),))

@every
def test_teacher_gets_no_gradient(name):
    s,t = make(dtype=torch.float32)
    funcs[name](s.requires_grad_(), t.requires_grad_()).backward()
    assert t.grad is None and s.grad.abs().sum()>0

def test_embedding_of_the_teacher():
    s,t = make()
    v = cc_loss(s, t.requires_grad_(), teach_grad=True)
    close(torch.autograd.grad(v, t)[0], grad(lambda t: cc_loss(t, s), t.detach())[1])

@every
@pytest.mark.parametrize('dtype', [torch.float64,torch.float16,torch.bfloat16])
def test_dtypes(name, dtype):
    s,t = make(dtype=dtype)
    v = funcs[name](s, t)
    assert v.dtype==(torch.float64 if dtype is torch.float64 else torch.float32)
    close(v.double(), funcs[name](s.double(), t.double()), rtol=1e-3, atol=1e-6)

@every
def test_autocast(name):
    s,t = make(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16): v = funcs[name](s, t)
    close(v, funcs[name](s, t))

@every
def test_zero_at_equality(name):
    s,_ = make()
    v,g = grad(funcs[name], s, s)
    assert v.abs()<1e-12 and g.abs().max()<1e-6

# ---------------------------------------------------------------- what a relation does not see
unseen = dict(rotation=lambda s: s@turn(5), scale=lambda s: s*7.5, shift=lambda s: s+3., sign=lambda s: -s, each=lambda s: s*torch.arange(1., len(s)+1)[:,None].double(), order=lambda s: s[:,[4,2,0,1,3]])
blind = dict(rkd={'rotation','scale','shift','sign','order'}, sp={'rotation','scale','sign','order'}, pkt={'rotation','scale','sign','each','order'}, cc={'rotation','scale','sign','each','order'},
    cka={'rotation','scale','shift','sign','order'}, skd_direction={'rotation','scale','sign','each','order'})
@every
@pytest.mark.parametrize('what', unseen)
def test_invariance(name, what):
    s,t = make()
    a,b = funcs[name](s, t),funcs[name](unseen[what](s), t)
    same = torch.isclose(a, b, rtol=1e-9, atol=1e-12)
    assert same==(what in blind[name])
    if what in blind[name]: close(funcs[name](t, s), funcs[name](t, unseen[what](s)))

@every
def test_items_in_any_order(name):
    s,t = make()
    p = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    close(funcs[name](s, t, reduction='none')[p], funcs[name](s[p], t[p], reduction='none'))

# ---------------------------------------------------------------- traps
def dup(x): return x[[0,0,1,1,2,3,3]]
def zero_row(x): x = x.clone(); x[2] = 0; return x
traps = dict(zeros=torch.zeros_like, alike=torch.ones_like, duplicates=dup, zero_row=zero_row, huge=lambda x: x*1e4, tiny=lambda x: x*1e-12, far=lambda x: x+1e4, half=lambda x: x.half(), bf16=lambda x: x.bfloat16(),
    huge_half=lambda x: x.half()*1e4, opposite=lambda x: torch.cat([x[:3],-x[:3],x[:1]]), nearly=lambda x: x[:1]+1e-6*x)
@every
@pytest.mark.parametrize('a', traps)
@pytest.mark.parametrize('b', traps)
def test_traps(name, a, b):
    s,t = make(dtype=torch.float32)
    s = traps[a](s).detach().requires_grad_()
    v = funcs[name](s, traps[b](t))
    v.backward()
    assert v.isfinite() and v.dtype==torch.float32 and s.grad.isfinite().all()
    if a in ('zeros','alike','duplicates','zero_row'): assert s.grad.abs().max()<1e3

def test_rkd_far_from_the_origin():
    "Float32 features with a large common offset keep their distances"
    s,t = make(dtype=torch.float32)
    close(rkd_loss((s+1e3), t), rkd_loss((s+1e3).double(), t.double()).float(), rtol=1e-5, atol=1e-6)

@every
def test_bad_input(name):
    f,(s,t) = funcs[name],make()
    for bad,said in (((s[0],t[0]),'`\\(n,...\\)`'), ((s[:0],t[:0]),'nothing to compare'), ((s[:,:0],t),'nothing to compare'), ((s,t[:4]),'agree in items')):
        with pytest.raises(ValueError, match=said): f(*bad)
    with pytest.raises(ValueError, match='at least 2.*drop_last'): f(s[:1], t[:1])
    with pytest.raises(TypeError, match='tuple|NoneType'): f(s, None)
    for k in ('mode','kernel'):
        if k in inspect.signature(f).parameters:
            with pytest.raises(ValueError, match=f'`{k}`.*nothing'): f(s, t, **{k:'nothing'})

def test_bad_numbers():
    s,t = make()
    with pytest.raises(ValueError, match='w_d'): rkd_loss(s, t, w_d=-1)
    with pytest.raises(ValueError, match='w_d'): rkd_loss(s, t, 0, 0)
    with pytest.raises(ValueError, match='gamma'): cc_loss(s, t, gamma=0)
    with pytest.raises(ValueError, match='tikhonov'): skd_direction_loss(s, t, tikhonov=0)
    with pytest.raises(ValueError, match='at least 4'): cka(s[:3], t[:3], unbiased=True)

def test_cka():
    s,t = make()
    assert cka(s, s)>1-1e-9 and cka(s, s, unbiased=True)>1-1e-9
    close(cka(s, t), 1-cka_loss(s, t)); close(cka(s, t, unbiased=True), 1-cka_loss(s, t, unbiased=True)); close(cka(s, t), cka(t, s))
    o = torch.stack([cka(*make(16, 8, 300, seed=i), unbiased=True) for i in range(200)])
    assert o.mean().abs()<3*o.std()/200**.5

@pytest.mark.parametrize('k', [1e-37,1e-25,1e19,1e30])
def test_rkd_knows_no_scale(k):
    a,b = torch.randn(6,5),torch.randn(6,7)
    a,b = a/a.norm(),b/b.norm()
    ref,x = rkd_loss(a, b),(a*k).requires_grad_()
    loss = rkd_loss(x, b*k)
    assert loss.item()==pytest.approx(ref.item(), rel=1e-4)
    g, = torch.autograd.grad(loss, x)
    y = a.clone().requires_grad_()
    torch.testing.assert_close(g*k, torch.autograd.grad(rkd_loss(y, b), y)[0], rtol=1e-3, atol=1e-5)
