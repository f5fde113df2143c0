"Lean KD against the plain form: values, gradients, layouts, precision, what is kept, and how it is chosen"
import math,random
from copy import deepcopy
from itertools import product
import pytest,torch,torch.nn.functional as F
from torch import nn
import fastkd.losses.lean as lean_module
from fastkd.losses.lean import LeanKL,soft_kl,_pieces
from fastkd.losses.logits import KDLoss,kd_loss,_kd_scale
from fastkd.losses.sparse import SparseTargets

f64,f32,f16,bf16 = torch.float64,torch.float32,torch.float16,torch.bfloat16

@pytest.fixture
def always(monkeypatch):
    "Lean for everything, in pieces of a few numbers"
    monkeypatch.setattr(LeanKL, 'above', 0); monkeypatch.setattr(LeanKL, 'chunk', 50)
@pytest.fixture
def small(monkeypatch): monkeypatch.setattr(LeanKL, 'chunk', 50)

def rnd(*sh, seed=0, dtype=f64): return (3*torch.randn(*sh, generator=torch.Generator().manual_seed(seed), dtype=f64)).to(dtype)
def pair(*sh, seed=0, dtype=f64): return rnd(*sh, seed=2*seed, dtype=dtype),rnd(*sh, seed=2*seed+1, dtype=dtype)
def loop(s, t, T, axis=1): # one position at a time, from lists
    s,t = s.movedim(axis,-1),t.movedim(axis,-1)
    def _one(z, w):
        p,q = [[math.exp(o/T) for o in v] for v in (w.tolist(),z.tolist())]
        p,q = [[o/sum(v) for o in v] for v in (p,q)]
        return sum(a*math.log(a/b) for a,b in zip(p,q))
    return torch.tensor([_one(z,w) for z,w in zip(s.reshape(-1,s.shape[-1]),t.reshape(-1,s.shape[-1]))], dtype=f64).view(s.shape[:-1])
def plain(s, t, T): # as it was written before there was a lean form
    up = lambda x: x.float() if x.dtype in (f16,bf16) else x
    lp,lq = F.log_softmax(up(t)/T,1),F.log_softmax(up(s)/T,1)
    return (lp.exp()*(lp-lq)).sum(1)
def grads(f, s, t, w=1.):
    x = s.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    loss = f(x, t)
    return loss.detach(),torch.autograd.grad((loss*w).sum(), x)[0]
def lean(T=4.): return lambda s,t: soft_kl(s,t,T,lean=True)
def same(a, b, tol): torch.testing.assert_close(a, b, rtol=tol, atol=tol)

shapes = [(6,10),(1,2),(5,1),(3,7,5),(2,5,4,6),(2,3,1,70),(1,4,2,3,4),(2,60),(40,3),(2,1,3,3),(3,5,1,1)]

@pytest.mark.parametrize('shape', shapes)
def test_values_and_gradients(small, shape):
    s,t = pair(*shape); w = rnd(shape[0],*shape[2:],seed=9)
    (l0,g0),(l1,g1) = grads(lambda s,t: plain(s,t,4.), s, t, w),grads(lean(), s, t, w)
    same(l1, l0, 1e-12); same(g1, g0, 1e-12); same(l1, loop(s,t,4.), 1e-12)
    same(soft_kl(s,t,4.,lean=False), l0, 1e-12)
    s,t,w = s.float(),t.float(),w.float()
    (l0,g0),(l1,g1) = grads(lambda s,t: plain(s,t,4.), s, t, w),grads(lean(), s, t, w)
    same(l1, l0, 2e-6); same(g1, g0, 2e-6); assert l1.dtype==g1.dtype==f32

@pytest.mark.parametrize('shape', [(3,4),(2,3,4),(2,3,2,3),(2,60)])
def test_gradcheck(small, shape):
    s,t = pair(*shape)
    assert torch.autograd.gradcheck(lambda x: soft_kl(x,t,2.,lean=True), s.requires_grad_())

def test_random_shapes_and_pieces(monkeypatch):
    r = random.Random(0)
    for i in range(150):
        sh = [r.randint(1,6) for _ in range(r.randint(2,5))]
        monkeypatch.setattr(LeanKL, 'chunk', r.choice([1,3,10,40,200,10**6]))
        order = r.sample(range(len(sh)), len(sh)); back = [order.index(k) for k in range(len(sh))]
        s,t = [o.permute(*order).contiguous().permute(*back) if r.random()<.7 else o for o in pair(*sh, seed=i)]
        T,w = r.choice([.5,1.,4.,20.]),rnd(sh[0],*sh[2:],seed=99)
        (l0,g0),(l1,g1) = grads(lambda s,t: plain(s,t,T), s, t, w),grads(lean(T), s, t, w)
        same(l1, l0, 1e-12); same(g1, g0, 1e-12)

def test_pieces():
    r = random.Random(0)
    for _ in range(200):
        sh = [r.randint(1,9) for _ in range(r.randint(2,5))]; ax,size = r.choice([1,len(sh)-1]),r.choice([1,7,50,1000])
        seen,parts = torch.zeros(sh),_pieces(sh, ax, size)
        for i in parts: seen[i] += 1; assert seen[i].shape[ax]==sh[ax]
        assert (seen==1).all() and seen[parts[0]].numel()==max(seen[i].numel() for i in parts)

def dense(layout):
    s,t = pair(3,5,4,6)
    y = torch.randint(0,5,(3,4,6), generator=torch.Generator().manual_seed(0)); y[0] = 255; y[1,:2] = 255
    if layout=='channels_last': s,t = [o.contiguous(memory_format=torch.channels_last) for o in (s,t)]
    if layout=='mixed': t = t.contiguous(memory_format=torch.channels_last)
    if layout=='slices': s,t = [torch.cat([o,o],2)[:,:,1:5] for o in (s,t)]
    if layout=='expanded': t = t[:1].expand(3,-1,-1,-1)
    ax = dict(axis=-1, axis2=2).get(layout,1)
    if ax!=1: s,t = [o.movedim(1,ax).contiguous() for o in (s,t)]
    return s,t,y,ax

@pytest.mark.parametrize('layout', ['nchw','channels_last','mixed','slices','expanded','axis','axis2'])
@pytest.mark.parametrize('reduction', ['mean','sum','none'])
def test_kd_loss(monkeypatch, layout, reduction):
    s,t,y,ax = dense(layout)
    for ignore,mode,dtype in product((None,255), _kd_scale, (f64,f32)):
        a,b = s.to(dtype),t.to(dtype)
        f = lambda x,t: kd_loss(x, t, 3., reduction, ax, ignore, mode, y)
        monkeypatch.setattr(LeanKL, 'above', math.inf); l0,g0 = grads(f, a, b, 2.)
        monkeypatch.setattr(LeanKL, 'above', 0); monkeypatch.setattr(LeanKL, 'chunk', 50); l1,g1 = grads(f, a, b, 2.)
        tol = 1e-12 if dtype is f64 else 5e-6*max(1,l0.abs().max().item())
        same(l1, l0, tol); same(g1, g0, tol)
        if ignore is not None: assert g1.movedim(ax,-1)[y==ignore].abs().max()==0
        if mode=='paper' and ignore is None: same(l1.double(), {'mean':lambda o: o.mean(), 'sum':lambda o: o.mean((1,2)).sum(), 'none':lambda o: o.mean((1,2))}[reduction](9*loop(a,b,3.,ax)), max(tol,1e-12))

@pytest.mark.parametrize('dtype', [f16,bf16])
@pytest.mark.parametrize('shape', [(6,50),(2,20,5,6)])
def test_halves(always, dtype, shape):
    s,t = pair(*shape, dtype=dtype); scale = 2.**16
    ref,g0 = grads(lambda s,t: plain(s.float(),t.float(),4.), s, t, 1.)
    loss,g1 = grads(lean(), s, t, 1.)
    assert loss.dtype==f32 and g1.dtype==dtype; same(loss, ref, 1e-5)
    # rounded twice, to the precision of `dtype`
    eps = torch.finfo(dtype).eps
    assert ((g1.float()-g0.float()).abs()<=1.5*eps*g0.float().abs()+eps**2).all()
    # the scale of a loss scaler and the 1/n of a mean do not push small gradients under float16's range
    n = loss.numel()*1000
    (_,g0),(_,g1) = [grads(f, s, t, scale/n) for f in (lambda s,t: plain(s,t,4.), lean())]
    assert ((g1.float()-g0.float()).abs()<=1.5*eps*g0.float().abs()+1e-7).all() and (g0!=0).float().mean()>.9

def test_teacher_in_another_precision(always):
    s,t = pair(2,5,4,6)
    for a,b in product((f64,f32,f16), repeat=2):
        (l0,g0),(l1,g1) = [grads(f, s.to(a), t.to(b)) for f in (lambda s,t: plain(s,t,4.), lean())]
        assert l0.dtype==l1.dtype and g0.dtype==g1.dtype==a
        same(l1, l0, 1e-12 if a==b==f64 else 1e-5); same(g1, g0, 1e-12 if a==b==f64 else 2e-3 if a is f16 else 1e-6)

def test_autocast(always):
    net = nn.Conv2d(3,5,1); x,t = torch.randn(2,3,8,8),torch.randn(2,5,8,8)
    def _step(above):
        LeanKL.above = above; net.zero_grad()
        with torch.autocast('cpu', dtype=bf16): z = net(x); loss = kd_loss(z, t)
        assert z.dtype==bf16 and loss.dtype==f32
        loss.backward(); return loss.detach(),net.weight.grad.clone()
    (l0,g0),(l1,g1) = _step(math.inf),_step(0)
    same(l1, l0, 1e-6); same(g1, g0, 1e-2)

@pytest.mark.parametrize('dtype', [f32,f64,bf16,f16])
def test_extreme_logits(small, dtype):
    sh = (4,6,3,2); g = torch.Generator().manual_seed(0)
    big = lambda: (1e4*(2*torch.randint(0,2,sh,generator=g)-1)).to(dtype)
    s,t = pair(*sh, dtype=dtype); same_,zero = big(),torch.zeros(sh, dtype=dtype)
    for a,b in ((big(),big()),(big(),t),(s,big()),(t,t),(same_,same_),(zero,t),(s,zero),(zero,zero),(s+1e4,t)):
        for f in (lean(), lambda s,t: soft_kl(s,t,4.,lean=False)):
            loss,grad = grads(f, a, b); assert loss.isfinite().all() and grad.isfinite().all()
        (l0,g0),(l1,g1) = [grads(f, a, b) for f in (lambda s,t: plain(s,t,4.), lean())]
        torch.testing.assert_close(l1, l0, rtol=1e-5, atol=1e-3 if a.abs().max()>1e3 and dtype is not f64 else 1e-5)
    loss,grad = grads(lean(), t, t); assert (loss==0).all() and grad.abs().max()<1e-7

@pytest.mark.parametrize('how', [True,False])
@pytest.mark.parametrize('shape', [(4,9),(2,9,3,4)])
def test_masked_classes(small, how, shape):
    "-inf on both sides is as if the class were not there; a student alone without a class the teacher has is infinitely far"
    s,t = pair(*shape); a,b = s.clone(),t.clone(); a[:,6:] = b[:,6:] = -math.inf
    f = lambda s,t: soft_kl(s,t,4.,how)
    (l0,g0),(l1,g1) = grads(f, s[:,:6], t[:,:6]),grads(f, a, b)
    same(l1, l0, 1e-12); same(g1[:,:6], g0, 1e-12); assert (g1[:,6:]==0).all()
    # masked by the teacher alone: the student loses these classes
    l,g = grads(f, s, b); p,q = (b/4).softmax(1),(s/4).softmax(1)
    same(l, (torch.xlogy(p,p)-p*q.log()).sum(1), 1e-12); same(g, (q-p)/4, 1e-12)
    l,_ = grads(f, a, t); assert (l==math.inf).all()
    for x,y in ((a,b),(b,a)):
        y = y.clone(); y[0,0] = math.nan
        assert f(x,y)[0].isnan().all() and f(y,x)[0].isnan().all() and f(x,y)[1].isfinite().all()

def held(f):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda o: kept.append(o) or o, lambda o: o): out = f()
    return {o.untyped_storage().data_ptr():o.untyped_storage().nbytes() for o in kept},out

def test_kept_for_backward(always):
    for dtype in (f32,f16):
        s,t = pair(4,20,10,10, dtype=dtype); s.requires_grad_()
        kept,_ = held(lambda: kd_loss(s, t))
        assert max(kept.values())==s.nbytes and sum(kept.values())<=s.nbytes+64
        assert s.untyped_storage().data_ptr() not in kept
        kept,loss = held(lambda: kd_loss(s.detach(), t)); assert not kept and not loss.requires_grad
        with torch.no_grad(): kept,loss = held(lambda: kd_loss(s, t)); assert not kept and not loss.requires_grad
    s,t = pair(4,20,10,10, dtype=f32); s.requires_grad_()
    LeanKL.above = math.inf
    assert sum(held(lambda: kd_loss(s, t))[0].values())>=2*s.nbytes

def test_chosen_by_size(monkeypatch):
    calls,real = [],LeanKL.forward
    monkeypatch.setattr(LeanKL, 'forward', staticmethod(lambda *a: calls.append(1) or real(*a)))
    monkeypatch.setattr(LeanKL, 'above', 240)
    n = lambda f: (calls.clear(),f(),len(calls))[-1]
    for sh in ((24,10),(2,10,3,4),(1,240)):
        s,t = pair(*sh); below = s[:,:-1],t[:,:-1]
        assert n(lambda: kd_loss(s,t))==n(lambda: KDLoss()(s,t))==1 and n(lambda: kd_loss(*below))==0
    s,t = pair(24,10)
    assert n(lambda: kd_loss(s, SparseTargets.from_logits(t, 4., k=4), 4.))==0
    T = torch.tensor(4., requires_grad=True, dtype=f64)
    kd_loss(s,t,T).backward(); assert not calls and T.grad.abs()>0
    assert n(lambda: kd_loss(s,t,torch.tensor(4.)))==1
    g = torch.func.grad(lambda x: kd_loss(x,t))(s); assert n(lambda: torch.func.vmap(lambda x,y: kd_loss(x[None],y[None]))(s,t))==0
    same(g, grads(lambda s,t: kd_loss(s,t), s, t)[1], 1e-12)
    assert LeanKL.above==240 and lean_module.LeanKL is LeanKL

def test_default_size():
    assert 2**17<=LeanKL.above<=2**20
    s,t = torch.randn(8,LeanKL.above//8),torch.randn(8,LeanKL.above//8)
    (l0,g0),(l1,g1) = grads(lambda s,t: 25*plain(s,t,5.).mean(), s, t),grads(lambda s,t: kd_loss(s,t), s, t)
    same(l1, l0, 1e-5); same(g1, g0, 1e-6); assert kd_loss(s.requires_grad_(),t).grad_fn is not None

def test_second_derivatives(always):
    s,t = pair(4,10); s.requires_grad_(); other = nn.Parameter(torch.ones((), dtype=f64))
    for loss in (kd_loss(s,t), kd_loss(s,t)*other):
        with pytest.raises(NotImplementedError, match='LeanKL.above = math.inf'): torch.autograd.grad(loss, s, create_graph=True)
    with pytest.raises(NotImplementedError, match='second derivatives'): torch.autograd.functional.hessian(lambda x: kd_loss(x,t), s)
    LeanKL.above = math.inf
    g, = torch.autograd.grad(kd_loss(s,t), s, create_graph=True); torch.autograd.grad(g.pow(2).sum(), s)

def test_kept_graph_and_accumulation(always):
    "Backward twice, from two losses, into one `.grad`; an earlier gradient stays what it was"
    s,t = pair(3,5,4,4); s.requires_grad_(); ref, = torch.autograd.grad(9*plain(s,t,3.).mean(), s)
    loss = kd_loss(s,t,3.)
    a, = torch.autograd.grad(loss, s, retain_graph=True); b, = torch.autograd.grad(3*loss, s, retain_graph=True); c, = torch.autograd.grad(0*loss, s, retain_graph=True)
    d, = torch.autograd.grad(loss, s)
    for o,k in ((a,1),(b,3),(c,0),(d,1)): same(o, k*ref, 1e-12)
    with pytest.raises(RuntimeError, match='second time'): loss.backward()
    for _ in range(3): kd_loss(s,t,3.).backward()
    same(s.grad, 3*ref, 1e-12)
    z = s*1; loss = kd_loss(z,t,3.)+z.pow(2).sum()+kd_loss(z,t,3.)
    same(torch.autograd.grad(loss, s)[0], 2*ref+2*s.detach(), 1e-12)
    seen = []; z = s*1; z.register_hook(lambda g: seen.append(g.clone()) or 2*g)
    same(torch.autograd.grad(kd_loss(z,t,3.), s)[0], 2*ref, 1e-12); same(seen[0], ref, 1e-12)

def test_without_the_private_flag(always, monkeypatch):
    "Where torch does not tell whether the graph is kept, the gradient is a new array"
    monkeypatch.delattr(torch._C._autograd, '_get_current_graph_task_keep_graph', raising=False)
    s,t = pair(3,5,4,4); (l0,g0),(l1,g1) = [grads(f, s, t) for f in (lambda s,t: plain(s,t,4.), lean())]
    same(g1, g0, 1e-12)

def test_checkpoint_and_offload(always):
    from torch.utils.checkpoint import checkpoint
    net = nn.Linear(4,10).double(); x,t = rnd(6,4),rnd(6,10,seed=1)
    def _grad(f): net.zero_grad(); f().backward(); return net.weight.grad.clone()
    ref = _grad(lambda: kd_loss(net(x),t))
    same(_grad(lambda: checkpoint(lambda x: kd_loss(net(x),t), x, use_reentrant=False)), ref, 0)
    with torch.autograd.graph.save_on_cpu(): same(_grad(lambda: kd_loss(net(x),t)), ref, 0)

def test_deterministic_and_threads(monkeypatch):
    monkeypatch.setattr(LeanKL, 'above', 0)
    s,t = pair(4,21,40,50, dtype=f32); a,b = grads(lambda s,t: kd_loss(s,t), s, t),grads(lambda s,t: kd_loss(s,t), s, t)
    assert torch.equal(a[0],b[0]) and torch.equal(a[1],b[1])
    s0,t0 = s.clone(),t.clone(); kd_loss(s.requires_grad_(),t).backward(); assert torch.equal(s.detach(),s0) and torch.equal(t,t0)
    n = torch.get_num_threads()
    try: torch.set_num_threads(2); c = grads(lambda s,t: kd_loss(s,t), s.detach(), t)
    finally: torch.set_num_threads(n)
    same(c[0], a[0], 1e-6); same(c[1], a[1], 1e-7)

def test_in_training(always):
    "A few steps with either form end at the same weights"
    def _train(above):
        torch.manual_seed(0); LeanKL.above = above
        net = nn.Sequential(nn.Conv2d(3,8,3,padding=1),nn.ReLU(inplace=True),nn.Conv2d(8,5,1)); opt = torch.optim.Adam(net.parameters(), 1e-2)
        x,t,y = torch.randn(4,3,8,8),torch.randn(4,5,8,8),torch.randint(0,5,(4,8,8))
        for _ in range(5):
            for i in (0,2):
                z = net(x[i:i+2]); (.5*F.cross_entropy(z,y[i:i+2])+.5*kd_loss(z,t[i:i+2])).backward()
            opt.step(); opt.zero_grad()
        return torch.cat([p.detach().flatten() for p in net.parameters()])
    same(_train(0), _train(math.inf), 1e-4)

def test_compile(always):
    "Compiled code takes the plain form; a compiled student takes either"
    s,t = pair(4,10, dtype=f32); ref = grads(lambda s,t: kd_loss(s,t), s, t)
    f = torch.compile(lambda s,t: kd_loss(s,t), backend='aot_eager', fullgraph=True)
    for a,b in zip(grads(f, s, t), ref): same(a, b, 1e-6)
    net = nn.Linear(10,10); quick = torch.compile(net, backend='aot_eager')
    def _grad(m): net.zero_grad(); kd_loss(m(s),t).backward(); return net.weight.grad.clone()
    same(_grad(quick), _grad(net), 1e-6)

def test_subclass_and_copy(always):
    class Sub(torch.Tensor): pass
    s,t = pair(4,10); out = kd_loss(s.as_subclass(Sub).requires_grad_(), t.as_subclass(Sub)); assert type(out) is torch.Tensor
    out.backward(); same(deepcopy(KDLoss(T=2.))(s,t), kd_loss(s,t,2.), 0)
    with torch.inference_mode(): same(kd_loss(s,t,2.).clone(), KDLoss(T=2.)(s,t), 0)

@pytest.mark.parametrize('T', [0.,-1.,math.inf,math.nan])
def test_bad_temperature(always, T):
    with pytest.raises(ValueError, match='`T` must be greater than 0'): kd_loss(*pair(3,4), T)

def test_bad_input_as_before(always):
    s,t = pair(3,4)
    with pytest.raises(ValueError, match='differ in shape'): kd_loss(s, t[:,:1])
    with pytest.raises(ValueError, match='nothing to compare'): kd_loss(s[:0], t[:0])
    with pytest.raises(ValueError, match='needs logits'): kd_loss(s[0], t[0])

def test_mlkd_keeps_nothing_that_grows_with_the_square_of_the_classes():
    "Its class term is computed from products of items, and equals that of the products of classes"
    from fastkd.losses.all import mlkd_loss
    (s,t),sizes = pair(4, 2000),[]
    s.requires_grad_()
    def pack(o):
        sizes.append(o.numel())
        return o
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda o: o): res = mlkd_loss(s, t, Ts=(), T=2.)
    assert max(sizes)<=s.numel()
    ps,pt = (s/2).softmax(1),(t/2).softmax(1)
    items,classes = (pt@pt.T-ps@ps.T).pow(2).sum(1).mean(),(pt.T@pt-ps.T@ps).pow(2).sum()/2000
    want = 4*(pt*(pt.log()-ps.log())).sum(1).mean()+items+classes
    torch.testing.assert_close((res,*torch.autograd.grad(res, s)), (want,*torch.autograd.grad(want, s)))

@pytest.mark.parametrize('mode', _kd_scale)
@pytest.mark.parametrize('shape', [(6,5),(3,4,2,3)], ids=str)
def test_mean_of_small_logits(mode, shape):
    "It takes fewer calls than 'none', and is its mean; so are the gradients"
    s,t = pair(*shape, seed=4)
    s.requires_grad_()
    a,b = kd_loss(s, t, 3., mode=mode),kd_loss(s, t, 3., mode=mode, reduction='none').mean()
    same((a,*torch.autograd.grad(a, s)), (b,*torch.autograd.grad(b, s)), 1e-12)
    same(kd_loss(s, t, 3.), 9*loop(s, t, 3.).mean(), 1e-12)

def test_mean_with_masked_classes():
    "A class at -inf on both sides adds nothing, and one that only the student rules out makes the loss infinite"
    s,t = pair(4,5)
    for z in (s,t): z[:,2] = -math.inf
    keep = [0,1,3,4]
    same(kd_loss(s, t, 2.), 4*loop(s[:,keep], t[:,keep], 2.).mean(), 1e-12)
    s[0,1] = -math.inf
    assert kd_loss(s, t, 2.)==math.inf

@pytest.mark.parametrize('ignore,labels', [(-100,[0,-100,4]),(255,[255,1,3]),(255,[0,1,2]),(-1,[-5,0,-1]),(2,[0,1,2]),(-100,[-100]*3)], ids=str)
def test_ignored_positions(ignore, labels):
    "Whether the labels that do not count are below or above the others, some, none or all"
    (s,t),y = pair(3,5),torch.tensor(labels)
    want = [25*v for v,o in zip(loop(s, t, 5.).tolist(), labels) if o!=ignore]
    same(kd_loss(s, t, ignore_index=ignore, targ=y).item(), sum(want)/max(len(want), 1), 1e-12)
