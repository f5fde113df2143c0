"Feature losses against plain loops written from the papers, and against torchdistill where it is installed"
import inspect,math,pickle,re,sys
from collections import namedtuple
from itertools import product
import pytest,torch,torch.nn.functional as F
import fastkd.losses.all
from fastkd.core import KDModule,get_loss,loss_needs
from fastkd.losses.features import *

f64 = torch.float64
def rnd(*sh, seed=0, dtype=f64): return torch.randn(*sh, generator=torch.Generator().manual_seed(seed), dtype=f64).to(dtype)
def tree(f, o): return [tree(f, p) for p in o] if isinstance(o, (list,tuple)) else f(o)
def leaves(o): return [q for p in o for q in leaves(p)] if isinstance(o, (list,tuple)) else [o]
def gen(): # a generator with fixed weights
    torch.manual_seed(0)
    return mgd_generator(3).double()
class Gen(torch.nn.Module):
    "Weights in the precision of the input, as an adapter in training has them"
    def __init__(self): super().__init__(); self.g = gen()
    def forward(self, x): return self.g.to(x.dtype)(x)

# ---------------------------------------------------------------- plain loops: one value per item, from lists
def vec(x): return x.flatten().tolist()
def rows(x): return x.flatten(1).tolist() # (c,hw) of one item
def cols(x): return [list(o) for o in zip(*rows(x))]
def dot(a, b): return sum(p*q for p,q in zip(a,b))
def size(a, p=2): return sum(abs(v)**p for v in a)**(1/p)
def unit(a, p=2): return [v/size(a,p) for v in a] if size(a,p) else a
def dist(a, b, p=2): return size([v-w for v,w in zip(a,b)], p)
def mse(a, b): return dist(a,b)**2/len(a)
def corr(a, b):
    ma,mb = sum(a)/len(a),sum(b)/len(b)
    a,b = [v-ma for v in a],[v-mb for v in b]
    return dot(a,b)/(size(a)*size(b)+1e-8)
def sm(z, T=1.): e = [math.exp(v/T) for v in z]; return [v/sum(e) for v in e]
def att(x, p=2): return unit([sum(abs(v)**p for v in o) for o in cols(x)])
def pool(x, k, f): return F.adaptive_avg_pool2d(x, k) if f=='avg' else F.adaptive_max_pool2d(x, k)

def o_at(s, t, mode='paper', p=2):
    d = dist(att(s,p), att(t,p))
    return d if mode=='paper' else d**2/s[0].numel()
def o_attention(s, t): return o_at(*[pool(o[None], 2, 'avg')[0] for o in (s,t)], 'code')
def o_fsp(s, t, mode='paper'):
    def G(a, b):
        a = pool(a[None], b.shape[-1], 'max')[0]
        return [[dot(u,v)/len(u) for v in rows(b)] for u in rows(a)]
    D = [[p-q for p,q in zip(u,v)] for u,v in zip(G(*s),G(*t))]
    return sum(v*v for r in D for v in r) if mode=='paper' else sum(size(c) for c in zip(*D))
def o_nst(s, t):
    s,t = [unit(r) for r in rows(s)],[unit(r) for r in rows(t)]
    k = lambda A,B: sum(dot(a,b)**2 for a in A for b in B)/len(A)/len(B)
    return k(t,t)+k(s,s)-2*k(s,t)
def o_ab(s, t): return sum((a+1)**2*(a>-1 and b<=0)+(a-1)**2*(a<=1 and b>0) for a,b in zip(vec(s),vec(t)))
def o_ofd(s, t, m=(-.5,-.2,-1.)):
    tot = 0
    for a,b,k in zip(rows(s),rows(t),m):
        for u,v in zip(a,b): tot += (u-k)**2*(u>k and v<=k)+(u-v)**2*(u>v and k<v<=0)+(u-v)**2*(v>0)
    return tot
def o_vid(s, t): return sum(((a-b)**2/v+math.log(v))/2 for m,b,v in zip(rows(s[0]),rows(t),vec(s[1])) for a,b in zip(m,b))/t.numel()
def o_pad(s, t): return sum((a-b)**2/(1e-6+math.exp(l))+l for a,b,l in zip(vec(s[0]),vec(t),vec(s[1])))/t.numel()
def o_ft(s, t, p=1, q=2, mode='paper'):
    d = dist(unit(vec(s),q), unit(vec(t),q), p)
    return d/s.numel() if mode=='torchdistill' and p==1 else d
def o_affinity(s, t, mode='paper'):
    if mode=='paper':
        S,T = [[unit(o) for o in cols(x)] for x in (s,t)]
        return sum((dot(S[i],S[j])-dot(T[i],T[j]))**2 for i in range(len(S)) for j in range(len(S)))/len(S)**2
    tot = 0
    for a,b in zip(rows(s),rows(t)):
        a,b = unit(a),unit(b)
        tot += size([(a[i]*a[j]-b[i]*b[j])/len(a) for i in range(len(a)) for j in range(len(a))])
    return tot
def o_review(s, t):
    ks = [k for k in (4,2,1) if k<min(s.shape[1:])]
    parts = [(1.,mse(vec(s),vec(t)))]+[(.5**(i+1), mse(vec(pool(s[None],k,'avg')),vec(pool(t[None],k,'avg')))) for i,k in enumerate(ks)]
    return sum(w*v for w,v in parts)/sum(w for w,_ in parts)
def o_ickd(s, t, mode='paper', n=4):
    G = lambda x: [unit([dot(a,b) for b in rows(x)]) for a in rows(x)]
    c = len(s)
    return sum(dist(a,b)**2 for a,b in zip(G(s),G(t)))/{'paper':c*c,'cifar':c,'torchdistill':c*n}[mode]
def o_catkd(s, t):
    S,T = [[unit(r) for r in rows(pool(x[None],2,'avg')[0])] for x in (s,t)]
    return sum(mse(a,b) for a,b in zip(S,T))/len(S)
def o_wkd(s, t, gamma=2., grid=1):
    def mom(x):
        h,w = x.shape[1:]; out = []
        for c,i,j in product(x, range(grid), range(grid)):
            v = vec(c[i*h//grid:math.ceil((i+1)*h/grid), j*w//grid:math.ceil((j+1)*w/grid)]); m = sum(v)/len(v)
            out.append((m, math.sqrt(sum((o-m)**2 for o in v)/max(len(v)-1,1)+1e-5)))
        return out
    return sum(gamma*(a-c)**2+(b-d)**2 for (a,b),(c,d) in zip(mom(s),mom(t)))/grid**2
def o_hidden(s, t, normalize=False):
    S,T = [[unit(r) if normalize else r for r in o.reshape(-1,o.shape[-1]).tolist()] for o in (s,t)]
    return sum(mse(a,b) for a,b in zip(S,T))/len(S)
def o_mgd(s, t):
    with torch.no_grad(): out = gen()(s[None])[0]
    return 7e-5*dist(vec(out),vec(t))**2
# the batch plays a part: lists of items in, list of values out
def o_srd(fs, ft, e=4, T=1., scale=None):
    pair = isinstance(fs, (list,tuple))
    a,b = (fs[0],ft[0]) if pair else (fs,ft)
    v = 2*math.log(sum(abs(p-q)**e for p,q in zip(vec(a),vec(b))))
    kl = lambda s,t: (T*T if scale is None else scale)*sum(p*math.log(p/q) for p,q in zip(sm(t,T),sm(s,T)))
    return [v+(kl(s,t) if pair else 0) for s,t in (zip(fs[1].tolist(),ft[1].tolist()) if pair else zip(a.tolist(),b.tolist()))]
def o_dist_plus(fs, ft, sign=-1, T=1.):
    (ms,zs),(mt,zt) = fs,ft
    P,Q = [[sm(r,T) for r in z.tolist()] for z in (zs,zt)]
    intra = sum(corr(list(a),list(b)) for a,b in zip(zip(*P),zip(*Q)))/len(P[0])
    S,R = [[[sum(c) for c in cols(m)] for m in x] for x in (ms,mt)]
    space = sum(corr(list(a),list(b)) for a,b in zip(zip(*S),zip(*R)))/len(S[0])
    chan = [sum(corr(a,b) for a,b in zip(cols(p),cols(q)))/p[0].numel() for p,q in zip(ms,mt)]
    return [T*T*(1-corr(p,q)+1-intra)+(1-c if sign<0 else c)+1-space for p,q,c in zip(P,Q,chan)]
def o_nd(fs, ft, y, centers): return [1-dot(s,unit(centers[k].tolist()))/max(size(s),size(t)) for s,t,k in zip(fs.tolist(),ft.tolist(),y.tolist())]

# ---------------------------------------------------------------- cases: name, keywords, features, value per item
Case = namedtuple('Case', 'name kw fs ft oracle zero batch', defaults=(True,False))
m = lambda seed,c=3,h=4,w=4: rnd(4,c,h,w,seed=seed)
S,R = m(1),m(2)
y = torch.tensor([0,2,2,1])
cen = rnd(3,5,seed=9)
each = lambda f: lambda fs,ft: [f(tree(lambda o: o[i], fs), tree(lambda o: o[i], ft)) for i in range(4)]
cases = [
    Case('hint', {}, S, R, each(lambda s,t: mse(vec(s),vec(t)))),
    Case('hint', dict(mode='paper'), S, R, each(lambda s,t: dist(vec(s),vec(t))**2/2)),
    Case('at', {}, S, m(2,5), each(o_at)),
    Case('at', dict(p=3.), S, m(2,5), each(lambda s,t: o_at(s,t,p=3))),
    Case('at', dict(mode='code'), S, m(2,5), each(lambda s,t: o_at(s,t,'code'))),
    Case('at', dict(mode='torchdistill'), S, m(2,5), each(lambda s,t: o_at(s,t,'code'))),
    Case('attention', {}, S, m(2,5,2,2), each(o_attention)),
    Case('fsp', {}, [S,m(3,2,2,2)], [R,m(4,2,2,2)], each(o_fsp)),
    Case('fsp', dict(mode='torchdistill'), [S,m(3,2,2,2)], [R,m(4,2,2,2)], each(lambda s,t: o_fsp(s,t,'torchdistill'))),
    Case('nst', {}, S, m(2,5), each(o_nst)),
    Case('nst', {}, m(1,20,3,3), m(2,6,3,3), each(o_nst)),
    Case('ab', {}, S, R, each(o_ab), False),
    Case('ofd', dict(margin=torch.tensor([-.5,-.2,-1.])), S, R, each(o_ofd)),
    Case('vid', {}, [S,rnd(1,3,1,1,seed=3).exp()], R, lambda fs,ft: [o_vid((a,fs[1]),b) for a,b in zip(fs[0],ft)], False),
    Case('pad', {}, [S,R*.5], R, each(o_pad), False),
    Case('ft', {}, S, R, each(o_ft)),
    Case('ft', dict(p=2.), S, R, each(lambda s,t: o_ft(s,t,2))),
    Case('ft', dict(mode='torchdistill'), S, R, each(lambda s,t: o_ft(s,t,mode='torchdistill'))),
    Case('kta', {}, S, R, each(o_ft)),
    Case('kta', dict(p=2.,q=1.), S, R, each(lambda s,t: o_ft(s,t,2,1))),
    Case('kta', dict(mode='torchdistill',q=3.), S, R, each(lambda s,t: o_ft(s,t,1,3,'torchdistill'))),
    Case('affinity', {}, S, m(2,5), each(o_affinity)),
    Case('affinity', {}, m(1,30), m(2,20), each(o_affinity)),
    Case('affinity', dict(mode='torchdistill'), S, R, each(lambda s,t: o_affinity(s,t,'torchdistill'))),
    Case('reviewkd', {}, m(1,2,6,5), m(2,2,6,5), each(o_review)),
    Case('reviewkd', {}, m(1,2,4,4), m(2,2,4,4), each(o_review)),
    Case('ickd', {}, S, m(2,3,5,2), each(o_ickd)),
    Case('ickd', dict(mode='cifar'), S, R, each(lambda s,t: o_ickd(s,t,'cifar'))),
    Case('ickd', dict(mode='torchdistill'), S, R, each(lambda s,t: o_ickd(s,t,'torchdistill')), True, True),
    Case('catkd', {}, S, m(2,3,5,5), each(o_catkd)),
    Case('wkd_feat', {}, S, m(2,3,5,2), each(o_wkd)),
    Case('wkd_feat', dict(grid=2,gamma=.5), m(1,2,5,3), m(2,2,5,3), each(lambda s,t: o_wkd(s,t,.5,2))),
    Case('hidden', {}, rnd(4,6,5,seed=1), rnd(4,6,5,seed=2), each(o_hidden)),
    Case('hidden', dict(normalize=True), rnd(4,6,5,seed=1), rnd(4,6,5,seed=2), each(lambda s,t: o_hidden(s,t,True))),
    Case('mgd', dict(generator=Gen(),ratio=0.), S, R, each(o_mgd), False),
    Case('simkd', {}, S, R, each(lambda s,t: mse(vec(s),vec(t)))),
    Case('norm', {}, S, R, each(lambda s,t: size(vec(s),1)), False),
    Case('norm', dict(p=2.), S, R, each(lambda s,t: size(vec(s))), False),
    Case('norm', dict(mode='torchdistill',p=2.), S, R, lambda fs,ft: [size(vec(fs))]*4, False, True),
    Case('srd', {}, rnd(4,5,seed=1), rnd(4,5,seed=2), o_srd, False, True),
    Case('srd', dict(T=2.,exponent=3.), [rnd(4,5,seed=1),rnd(4,3,seed=3)], [rnd(4,5,seed=2),rnd(4,3,seed=4)], lambda s,t: o_srd(s,t,3,2.), False, True),
    Case('srd', dict(T=2.,mode='torchdistill'), [rnd(4,5,seed=1),rnd(4,3,seed=3)], [rnd(4,5,seed=2),rnd(4,3,seed=4)], lambda s,t: o_srd(s,t,4,2.,1), False, True),
    Case('dist_plus', dict(T=2.), [S,rnd(4,3,seed=3)], [R,rnd(4,3,seed=4)], lambda s,t: o_dist_plus(s,t,T=2.), True, True),
    Case('dist_plus', dict(mode='torchdistill'), [S,rnd(4,3,seed=3)], [R,rnd(4,3,seed=4)], lambda s,t: o_dist_plus(s,t,1), False, True),
    Case('nd', dict(centers=cen), rnd(4,5,seed=1), rnd(4,5,seed=2), lambda s,t: o_nd(s,t,y,cen), False),
]
ids = [f"{c.name}-{'-'.join(f'{k}={v}' for k,v in c.kw.items() if not callable(v) and not torch.is_tensor(v))}" for c in cases]
names = sorted({c.name for c in cases})
each_case,each_name = pytest.mark.parametrize('c', cases, ids=ids),pytest.mark.parametrize('name', names)
def call(l, fs, ft, y=y): return l(fs, ft, y[:len(leaves(fs)[0])] if leaves(fs) and leaves(fs)[0] is not None else y) if loss_needs(l) else l(fs, ft)
def cast(o, dtype): return tree(lambda x: x.to(dtype), o)
def grads(c, fs, ft, **kw):
    fs = tree(lambda x: x.detach().clone().requires_grad_(), fs)
    ft = tree(lambda x: x.detach().clone().requires_grad_(), ft)
    v = call(get_loss(c.name, **{**c.kw, **kw}), fs, ft)
    v.sum().backward()
    return v.detach(),[x.grad for x in leaves(fs)],[x.grad for x in leaves(ft)]

def test_all_are_here():
    assert set(names)=={'hint','at','fsp','nst','ab','ofd','vid','ft','kta','affinity','pad','reviewkd','ickd','srd','catkd','mgd','simkd','nd','hidden','attention','wkd_feat','norm','dist_plus'}

@each_case
class TestCase:
    def test_value(self, c):
        got = call(get_loss(c.name, reduction='none', **c.kw), c.fs, c.ft)
        torch.testing.assert_close(got, torch.tensor(c.oracle(c.fs,c.ft), dtype=f64), rtol=1e-7, atol=1e-9)

    def test_gradient(self, c):
        l,flat = get_loss(c.name, reduction='none', **c.kw),leaves(c.fs)
        def f(*xs):
            it = iter(xs)
            return call(l, tree(lambda _: next(it), c.fs), c.ft)
        assert torch.autograd.gradcheck(f, [x.clone().requires_grad_() for x in flat])

    def test_reductions(self, c):
        one,mean,tot = [call(get_loss(c.name, reduction=r, **c.kw), c.fs, c.ft) for r in ('none','mean','sum')]
        assert one.shape==(4,) and mean.shape==tot.shape==()
        torch.testing.assert_close(mean, one.mean()); torch.testing.assert_close(tot, one.sum())
        if not c.batch: # an item's value does not depend on the others
            alone = [call(get_loss(c.name, **c.kw), *(tree(lambda o: o[i:i+1] if len(o)==4 else o, x) for x in (c.fs,c.ft)), y[i:i+1]) for i in range(4)]
            torch.testing.assert_close(one, torch.stack(alone))
        with pytest.raises(ValueError, match='avg'): call(get_loss(c.name, reduction='avg', **c.kw), c.fs, c.ft)

    def test_teacher_gets_nothing(self, c):
        _,gs,gt = grads(c, c.fs, c.ft)
        assert all(g is None for g in gt) and sum(g.abs().sum() for g in gs)>0

    @pytest.mark.parametrize('dtype', [torch.float32,torch.float16,torch.bfloat16])
    def test_dtypes(self, c, dtype):
        "Half precision is computed in float32, under autocast, too; a teacher may have another precision"
        fs,ft,l = cast(c.fs, dtype),cast(c.ft, dtype),get_loss(c.name, **c.kw)
        ref = call(l, cast(fs,f64), cast(ft,f64))
        with torch.autocast('cpu', dtype=torch.bfloat16): low = call(l, fs, ft)
        for got in (call(l, fs, ft), low, call(l, fs, cast(ft,f64)), call(l, cast(fs,torch.float32), ft)):
            assert got.dtype==torch.float32
            torch.testing.assert_close(got.double(), ref, rtol=2e-4, atol=1e-5)
        _,gs,_ = grads(c, fs, ft)
        assert all(g.dtype==dtype and g.isfinite().all() for g in gs)

    def test_zero_at_equality(self, c):
        v,gs,_ = grads(c, c.fs, c.fs) if c.name not in ('vid','pad') else grads(c, c.fs, c.fs[0])
        assert v.isfinite() and all(g.isfinite().all() for g in gs)
        if c.zero: assert abs(v)<1e-5 and all(g.abs().max()<1e-3 for g in gs)

    @pytest.mark.parametrize('dtype', [torch.float32,torch.float64])
    def test_traps(self, c, dtype):
        "Only finite numbers, and gradients of ordinary size where nothing is large"
        sides = cast(c.fs,dtype),cast(c.ft,dtype)
        zero,same = (lambda x: x*0),(lambda x: x)
        flat,huge,tiny = (lambda x: x*0+.1),(lambda x: 1e4*(x>0)-1e4*(x<=0)),(lambda x: x*1e-10)
        def dead(x): x = x.clone(); x[:,0] = 0; return x
        def row(x): x = x.clone(); x[0] = 0; return x
        def relu(x): return x.relu()
        for a,b in [(zero,same),(same,zero),(zero,zero),(flat,same),(same,flat),(flat,flat),(dead,same),(same,dead),(dead,dead),(row,same),(same,row),(row,row),(relu,relu),
                (huge,same),(same,huge),(huge,huge),(huge,lambda x: -huge(x)),(tiny,tiny)]:
            v,gs,_ = grads(c, tree(a,sides[0]), tree(b,sides[1]))
            assert v.isfinite() and all(g.isfinite().all() for g in gs), (a,b)
            if huge not in (a,b) and tiny not in (a,b) and c.name not in ('vid','pad'): assert all(g.abs().max()<1e4 for g in gs), (a,b)
        v,gs,_ = grads(c, *(tree(lambda x: x[:1], o) for o in sides))
        assert v.isfinite() and all(g.isfinite().all() for g in gs)

@each_name
class TestLoss:
    def case(self, name): return next(c for c in cases if c.name==name)

    def test_pair(self, name):
        "Function and module have the same keywords and defaults and give one value"
        c = self.case(name)
        l = get_loss(name, **c.kw)
        func,ps = type(l).func,inspect.signature(type(l).func).parameters
        assert isinstance(l, KDModule) and func.__name__==f'{name}_loss' and list(ps)[:2]==['fs','ft'] and isinstance(get_loss(name), KDModule)
        mod = sys.modules[func.__module__]
        assert getattr(mod, func.__name__) is func and {func.__name__,type(l).__name__}<=set(mod.__all__)
        hypers = {k:p.default for k,p in ps.items() if k not in ('fs','ft','targ')}
        assert {k:p.default for k,p in inspect.signature(type(l)).parameters.items()}==hypers
        assert hypers['reduction']=='mean' and not any(p.kind is p.VAR_KEYWORD for p in ps.values())
        torch.testing.assert_close(call(l,c.fs,c.ft), func(c.fs,c.ft,*([y] if loss_needs(l) else []),**c.kw))
        assert repr(l).startswith(type(l).__name__)
        with pytest.raises(TypeError, match='no_such'): get_loss(name, no_such=1)
        torch.testing.assert_close(call(pickle.loads(pickle.dumps(l)),c.fs,c.ft), call(l,c.fs,c.ft))

    def test_bad_input(self, name):
        c = self.case(name)
        l,said = get_loss(name, **c.kw),f'`{name}_loss`'
        cut = lambda o: tree(lambda x: x[:,:1,:1] if x.ndim>2 else x[:,:1], o)
        if name!='norm':
            for fs,ft in ((cut(c.fs),c.ft), (c.fs,cut(c.ft)), (c.fs,tree(lambda x: x[:2], c.ft))):
                if name=='attention' and leaves(ft)[0].shape[0]==4: continue
                with pytest.raises(ValueError) as e: call(l, fs, ft)
                assert said in str(e.value) and re.search('student|pair|axes', str(e.value)), str(e.value)
            with pytest.raises((ValueError,TypeError)): call(l, [c.fs,c.fs,c.fs], [c.ft])
            with pytest.raises((ValueError,TypeError)): call(l, c.fs, None)
            with pytest.raises((ValueError,TypeError)): call(l, c.fs, {'a':c.ft})
        with pytest.raises(ValueError): call(l, tree(lambda x: x[:0], c.fs), tree(lambda x: x[:0], c.ft))
        with pytest.raises((ValueError,TypeError)): call(l, [], [])
        with pytest.raises((ValueError,TypeError)): call(l, None, None)
        if 'mode' in l.hypers:
            with pytest.raises(ValueError, match='`mode`'): call(get_loss(name, **{**c.kw,'mode':'torch'}), c.fs, c.ft)

listy = [c for c in cases if c.name in ('hint','at','nst','ab','ft','kta','affinity','reviewkd','ickd','catkd','wkd_feat','simkd','norm')]
@pytest.mark.parametrize('c', listy, ids=lambda c: f'{c.name}{c.kw}')
def test_lists(c):
    "A list is the weighted sum over its pairs"
    a,b = call(get_loss(c.name,**c.kw), c.fs, c.ft),call(get_loss(c.name,**c.kw), c.ft if c.ft.shape==c.fs.shape else c.fs*.5+1, c.fs)
    pair = [c.fs, c.ft if c.ft.shape==c.fs.shape else c.fs*.5+1],[c.ft,c.fs]
    torch.testing.assert_close(call(get_loss(c.name,**c.kw), *pair), a+b)
    torch.testing.assert_close(call(get_loss(c.name,weights=[.5,3.],**c.kw), tuple(pair[0]), pair[1]), .5*a+3*b)
    with pytest.raises(ValueError, match='weights'): call(get_loss(c.name,weights=[1.],**c.kw), *pair)

class TestMore:
    def test_one_channel_is_never_broadcast(self):
        for name in ('hint','ab','ofd','reviewkd','simkd','affinity'):
            with pytest.raises(ValueError, match=r'\(4, 1, 4, 4\)'): get_loss(name, **(dict(mode='torchdistill') if name=='affinity' else {}))(S[:,:1], R)
        for bad in (torch.ones(3), torch.ones(1,2,1,1), torch.ones(1,1)):
            with pytest.raises(ValueError, match='variance'): vid_loss((S,bad), R)

    def test_fsp_pairs(self):
        fs,ft = [S,m(3),m(4,2,2,2)],[R,m(5),m(6,2,2,2)]
        two = lambda i,j: fsp_loss([fs[i],fs[j]], [ft[i],ft[j]])
        torch.testing.assert_close(fsp_loss(fs,ft), two(0,1)+two(1,2))
        torch.testing.assert_close(fsp_loss(fs,ft,pairs=[(0,2),(0,1)],weights=[2.,1.]), 2*two(0,2)+two(0,1))
        for kw in (dict(pairs=[(0,3)]), dict(pairs=[]), dict(weights=[1.])):
            with pytest.raises(ValueError): fsp_loss(fs, ft, **kw)
        with pytest.raises(ValueError, match='at least two'): fsp_loss(S, R)

    def test_hidden(self):
        hs,ht = [rnd(4,6,5,seed=i) for i in range(2)],[rnd(4,6,5,seed=5+i) for i in range(4)]
        each = lambda a,b: sum(hidden_loss(p,q) for p,q in zip(a,b))/2
        torch.testing.assert_close(hidden_loss(hs,ht), each(hs,ht[2:]))
        torch.testing.assert_close(hidden_loss(hs,ht,layers=(0,-1)), each(hs,[ht[0],ht[3]]))
        torch.testing.assert_close(hidden_loss(hs,ht,weights=[1.,1.]), 2*each(hs,ht[2:]))
        for a,b,kw in ((ht,hs,{}), (hs,ht,dict(layers=[1])), (hs,ht,dict(layers=[0,4]))):
            with pytest.raises(ValueError, match='teacher'): hidden_loss(a, b, **kw)
        with pytest.raises(ValueError, match='normalize=False'): hidden_loss(S, R, normalize=True)

    def test_attention_layers(self):
        fs,ft = [m(i) for i in range(4)],[m(i+5,5) for i in range(4)]
        torch.testing.assert_close(attention_loss(fs,ft,exclude_first_and_last=True), sum(at_loss(a,b,mode='code') for a,b in zip(fs[1:3],ft[1:3]))/2)
        with pytest.raises(ValueError, match='exclude_first_and_last=False'): attention_loss(fs[:2], ft[:2], exclude_first_and_last=True)

    def test_ofd_margin(self):
        bn = torch.nn.BatchNorm2d(4)
        with torch.no_grad(): bn.weight.copy_(torch.tensor([1.,-.5,2.,.1])); bn.bias.copy_(torch.tensor([0.,.3,-1.,1.]))
        z = rnd(200000,4,seed=1)*bn.weight.abs()+bn.bias
        mean = torch.stack([c[c<0].mean() if (c<0).float().mean()>.001 else torch.tensor(-.3) for c in z.detach().T])
        torch.testing.assert_close(ofd_margin(bn), mean.float(), rtol=.02, atol=.02)
        with pytest.raises(ValueError, match='margin=None'): ofd_margin(torch.nn.BatchNorm2d(3, affine=False))
        batch = torch.stack([R[:,i][R[:,i]<0].mean() for i in range(3)])
        torch.testing.assert_close(ofd_loss(S,R), ofd_loss(S,R,margin=batch))
        torch.testing.assert_close(ofd_loss([S,S],[R,R],margin=[batch,batch]), 2*ofd_loss(S,R))
        for bad in (torch.ones(2), torch.ones(1,3,1,1)):
            with pytest.raises(ValueError, match='margin'): ofd_loss(S, R, margin=bad)
        with pytest.raises(ValueError, match='margin'): ofd_loss([S,S], [R,R], margin=[batch])

    def test_class_maps(self):
        head = torch.nn.Linear(3,6).double()
        cams = class_maps(S, head)
        torch.testing.assert_close(cams.mean((2,3))+head.bias, head(S.mean((2,3))))
        torch.testing.assert_close(class_maps(S, torch.nn.Conv2d(3,6,1).double()).shape, cams.shape)
        torch.testing.assert_close(simkd_logits(S, head), head(S.mean((2,3)))); torch.testing.assert_close(simkd_logits(S.mean((2,3)), head), head(S.mean((2,3))))
        for f,h in ((S,torch.nn.Linear(4,2)), (S[:,:,0],head), (S,torch.nn.ReLU())):
            with pytest.raises(ValueError, match='class_maps'): class_maps(f, h)

    def test_gram_forms_agree(self):
        "Few places or few channels: two ways to one number"
        from fastkd.losses.grams import _gram_gap
        for k,a,b in ((3,7,5),(9,2,4),(9,4,2),(8,8,3)):
            u,v = rnd(2,k,a),rnd(2,k,b,seed=1)
            torch.testing.assert_close(_gram_gap(u,v), (u@u.mT-v@v.mT).pow(2).sum((1,2)))
        assert nst_loss(R.float(), R.float()[:,[2,0,1]]).abs()<1e-6 and affinity_loss(S.float(), S.float()*3).abs()<1e-6 # rounding, of either sign

    def test_mgd_masks(self):
        ident = torch.nn.Identity()
        x = torch.ones(200,20,5,5)
        for on,ratio in (('channel',.15),('position',.65)):
            torch.manual_seed(0)
            kept = []
            l = MGDLoss(lambda s: (kept.append(s), s)[1], ratio=ratio, on=on, alpha=1.)
            v = l(x, x)
            s = kept[0]; part = (s==0).float()
            assert abs(part.mean()-ratio)<.03 and set(s.unique().tolist())=={0.,1.}
            assert (part.std((2,3) if on=='channel' else 1)==0).all()
            torch.testing.assert_close(v, part.sum((1,2,3)).mean()) # what is hidden is missed
            assert l.eval()(x, x)==0
        two = MGDLoss([mgd_generator(3),mgd_generator(3)])
        assert len(list(two.parameters()))==8 and two([S.float()]*2, [R.float()]*2).isfinite()
        for bad in (None, [ident], 3):
            with pytest.raises(ValueError, match='generator'): mgd_loss([S,S], [R,R], bad)
        with pytest.raises(ValueError, match=r'mgd_generator\(3\)'): mgd_loss(S, R, torch.nn.Conv2d(3,2,1).double())
        for kw in (dict(ratio=1.), dict(on='pixel')):
            with pytest.raises(ValueError): mgd_loss(S, R, ident, **kw)

    def test_nd(self):
        fs,ft = rnd(4,5,seed=1),rnd(4,5,seed=2)
        c = class_centers(ft, y)
        torch.testing.assert_close(c, torch.stack([ft[y==k].mean(0) for k in range(3)]))
        torch.testing.assert_close(nd_loss(fs,ft,y), nd_loss(fs,ft,y,c))
        assert class_centers(ft, y, 5).shape==(5,5) and (class_centers(ft, y, 5)[3:]==0).all()
        l = NDLoss(c)
        assert list(l.state_dict())==['centers'] and l.needs==('targ',)
        for bad in (c[:,:3], c[:2], c[0]):
            with pytest.raises(ValueError, match='centers'): nd_loss(fs, ft, y, bad)
        with pytest.raises(ValueError, match='labels'): l(fs, ft)

    def test_numbers_out_of_range(self):
        for f,a in ((at_loss,dict(p=.5)),(attention_loss,dict(p=0)),(ab_loss,dict(margin=-1.)),(ft_loss,dict(p=.1)),(kta_loss,dict(q=0.)),(norm_loss,dict(p=0.)),
                (catkd_loss,dict(size=0)),(wkd_feat_loss,dict(grid=0)),(wkd_feat_loss,dict(eps=0.)),(reviewkd_loss,dict(sizes=(0,)))):
            with pytest.raises(ValueError, match=next(iter(a))): f(S, R, **a)
        for a in (dict(eps=0.),dict(T=0.),dict(exponent=.5)):
            with pytest.raises(ValueError, match=next(iter(a))): srd_loss(S.flatten(1), R.flatten(1), **a)
        for f,s in ((vid_loss,(S,S.exp())),(pad_loss,(S,S))):
            with pytest.raises(ValueError, match='eps'): f(s, R, eps=0.)

    def test_large_log_variance(self):
        lv = torch.full((2,3), 89., requires_grad=True)
        v = pad_loss((torch.zeros(2,3),lv), torch.ones(2,3)); v.backward()
        assert v==89 and lv.grad.isfinite().all()

    def test_features_are_not_changed(self):
        "Maps may be views of what the network goes on to use"
        for c in cases:
            a = tree(lambda x: x.clone(), (c.fs,c.ft))
            call(get_loss(c.name,**c.kw), c.fs, c.ft)
            assert all(torch.equal(p,q) for p,q in zip(leaves(a),leaves((c.fs,c.ft))))

# ---------------------------------------------------------------- torchdistill itself, where it is installed
def io(**kw): return {k:dict(output=v) for k,v in kw.items()}
def layer(k): return dict(io='output', path=k)
def td_pairs(n=1): return {f'p{i}':dict(student=layer(f's{i}'), teacher=layer(f't{i}'), weight=1.5) for i in range(n)}
def td_cases(td):
    w,one = dict(weights=[1.5]),lambda s,t: (io(s0=s),io(t0=t))
    fsp = dict(p=dict(student_first=layer('a'), student_second=layer('b'), teacher_first=layer('a'), teacher_second=layer('b'), weight=1.5))
    pos = dict(zip(('student_module_path','teacher_module_path'), 'st'))
    head = dict(student_logit_module_path='z', student_logit_module_io='output', teacher_logit_module_path='z', teacher_logit_module_io='output',
        student_feature_module_path='m', student_feature_module_io='output', teacher_feature_module_path='m', teacher_feature_module_io='output')
    srd = {f'{a}_{b}_module_{c}': {'path':b[0],'io':'output'}[c] for a in ('student','teacher') for b in ('feature','linear') for c in ('path','io')}
    fac = lambda s,t: (io(translator=s,feature_adapter=s),io(paraphraser=t))
    st = lambda s,t: (io(s=s),io(t=t))
    A,B = m(3,2,2,2),m(4,2,2,2)
    var,lv,z1,z2,e1,e2 = rnd(1,3,1,1,seed=3).exp(),rnd(4,48,seed=5),rnd(4,3,seed=3),rnd(4,3,seed=4),rnd(4,5,seed=1),rnd(4,5,seed=2)
    G,H = m(1,2,6,6),m(2,2,6,6)
    yield 'at', dict(mode='torchdistill',**w), S, m(2,5), td.ATLoss(td_pairs()), one
    yield 'at', dict(mode='paper',**w), S, m(2,5), td.ATLoss(td_pairs(), mode='paper'), one
    yield 'fsp', dict(mode='torchdistill',**w), [S,A], [R,B], td.FSPLoss(fsp), lambda s,t: (io(a=s[0],b=s[1]),io(a=t[0],b=t[1]))
    for p in (1.,2.): yield 'ft', dict(mode='torchdistill',p=p), S, R, td.FTLoss(p=p), fac
    for p,q in ((1.,2.),(2.,1.)): yield 'kta', dict(mode='torchdistill',p=p,q=q), S, R, td.KTALoss(p=p,q=q), fac
    yield 'ab', w, S, R, td.AltActTransferLoss(td_pairs(), 1., 'mean'), one
    yield 'ab', dict(reduction='sum',**w), S, R, td.AltActTransferLoss(td_pairs(), 1., 'sum'), one
    yield 'vid', w, [[S,var]], [R], td.VIDLoss(td_pairs()), lambda s,t: (io(s0=s[0]),io(t0=t[0]))
    yield 'pad', {}, [S.flatten(1),lv], R.flatten(1), td.PADL2Loss('s','t'), lambda s,t: (io(s=s[0],var_estimator=s[1]),io(t=t))
    yield 'reviewkd', {}, G, H, td.HierarchicalContextLoss('s','output','t','output'), lambda s,t: (io(s=(s,None)),io(t=t))
    yield 'norm', dict(mode='torchdistill',p=2.), S, R, td.RegularizationLoss('s',p=2), st
    yield 'affinity', dict(mode='torchdistill'), S, R, td.AffinityLoss(**pos), st
    yield 'ickd', dict(mode='torchdistill',**w), S, R, td.ChSimLoss(td_pairs()), one
    yield 'srd', dict(mode='torchdistill',exponent=4.,T=2.), [e1,z1], [e2,z2], td.SRDLoss(exponent=4.,temperature=2.,**srd), lambda s,t: (io(f=s[0],l=s[1]),io(f=t[0],l=t[1]))
    yield 'dist_plus', dict(mode='torchdistill',T=2.,beta=.5,gamma=2.,iota=.7,kappa=1.3), [S,z1], [R,z2], td.DISTPlusLoss(**head,beta=.5,gamma=2.,iota=.7,kappa=1.3,tau=2.), lambda s,t: (io(m=s[0],z=s[1]),io(m=t[0],z=t[1]))

def test_torchdistill():
    "`mode='torchdistill'` has its value and its gradient"
    td = pytest.importorskip('torchdistill.losses.mid_level')
    seen = set()
    for name,kw,fs,ft,ref,to_io in td_cases(td):
        out = []
        for f in (get_loss(name,**kw), lambda s,t: ref(*to_io(s,t))):
            s = tree(lambda x: x.clone().requires_grad_(), fs)
            v = f(s, ft); v.backward()
            out.append((v.detach(),*[x.grad for x in leaves(s)]))
        for a,b in zip(*out): # torchdistill sums Affinity in float32, whatever comes in
            if name=='affinity' and b.ndim==0: assert abs(a-b)<1e-6*abs(b)
            else: assert (a-b).abs().max()<=1e-7*max(1., b.abs().max().item()), (name,kw,(a-b).abs().max())
        seen.add(name)
    assert seen=={'at','fsp','ft','kta','ab','vid','pad','reviewkd','norm','affinity','ickd','srd','dist_plus'}

# ---------------------------------------------------------------- what the adapters say is what the losses take
@pytest.mark.parametrize('name,kind', [('hint','auto'),('vid','vid'),('ft','ft'),('kta','ft'),('ab','ab'),('ofd','conv'),('ickd','conv'),('reviewkd','review'),('pad','pad'),('srd','srd'),('simkd','simkd')])
def test_with_adapters(name, kind):
    from fastkd.adapters import make_adapter
    fs,ft = [[m(i,c,h,h).float() for i,c,h in o] for o in (((1,4,8),(2,6,4)),((3,8,8),(4,12,4)))]
    for a,b in ((fs,ft),(fs[0],ft[0])):
        if not isinstance(a, list) and kind=='review' or isinstance(a, list) and name=='srd': continue
        shapes = [[tuple(o.shape) for o in x] if isinstance(x, list) else tuple(x.shape) for x in (a,b)]
        adapter = make_adapter(*shapes, kind)
        get_loss(name)(*adapter(a, b)).backward()
        assert any(p.grad is not None and p.grad.abs().sum()>0 for p in adapter.parameters())

def test_features_and_logits_of_one_batch():
    "A pair of a feature and logits of another batch is refused, not broadcast"
    z,m,e = rnd(4,5).float(),rnd(1,3,2,2).float(),rnd(1,6).float()
    for f,o in ((dist_plus_loss,m), (srd_loss,e)):
        with pytest.raises(ValueError, match='student.*1 and 4 items'): f([o,z], [o,z])
