"The contract of every registered response loss: what holds for all of them, whatever they compute"
import inspect,pickle,sys
import pytest,torch
import fastkd.losses.all
from fastkd.core import KDModule,get_loss,list_losses,loss_needs

def make(shape=(6,5), seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    s,t = (2*torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    return s,t,torch.randint(shape[1], shape[:1]+shape[2:], generator=g)

def data_pars(func): return [k for k in inspect.signature(func).parameters if k in ('inp','teach','targ','fs','ft')]
def call(l, s, t, y): return l(s, t, y) if 'targ' in loss_needs(l) else l(s, t)
names = [o for o in list_losses() if data_pars(type(get_loss(o)).func)[:1]==['inp']]
no_classes = {'bkd','mse_logits'} # compare element by element, so `(n,)` is fine

def test_there_are_losses():
    assert {'kd','bkd','hard','mse_logits','dkd','nkd','dist','lskd','mlkd','ttm','wsld','ofa','abkd','rkl','jsd','wkd','skd_instance'}<=set(names)

@pytest.mark.parametrize('name', names)
class TestLoss:
    def test_pair(self, name):
        "Function and module have the same keywords and defaults, live in one module and give one value"
        l,(s,t,y) = get_loss(name),make()
        func,ps = type(l).func,inspect.signature(type(l).func).parameters
        assert isinstance(l, KDModule) and func.__module__==type(l).__module__
        mod = sys.modules[func.__module__]
        assert getattr(mod, func.__name__) is func and {func.__name__,type(l).__name__}<=set(mod.__all__)
        assert data_pars(func)[:2]==['inp','teach'] and list(ps)[:2]==['inp','teach']
        hypers = {k:p.default for k,p in ps.items() if k not in data_pars(func)}
        assert {k:p.default for k,p in inspect.signature(type(l)).parameters.items()}==hypers=={k:getattr(l, k) for k in hypers}
        assert hypers['reduction']=='mean' and not any(p.kind is p.VAR_KEYWORD for p in ps.values())
        torch.testing.assert_close(call(l, s, t, y), func(s, t, y) if 'targ' in loss_needs(l) else func(s, t))
        with pytest.raises(TypeError, match='no_such'): get_loss(name, no_such=1)

    def test_reductions(self, name):
        s,t,y = make()
        each,mean,total = (call(get_loss(name, reduction=r), s, t, y) for r in ('none','mean','sum'))
        assert each.shape==(6,) and mean.shape==total.shape==()
        torch.testing.assert_close(mean, each.mean())
        torch.testing.assert_close(total, each.sum())
        assert mean>0
        with pytest.raises(ValueError, match='avg'): call(get_loss(name, reduction='avg'), s, t, y)

    @pytest.mark.parametrize('dtype', [torch.float64,torch.float16,torch.bfloat16])
    def test_dtypes(self, name, dtype):
        "Half precision is computed in float32: the loss is that of the rounded logits"
        s,t,y = make(dtype=dtype)
        got,ref = call(get_loss(name), s, t, y),call(get_loss(name), s.double(), t.double(), y)
        assert got.dtype==(torch.float64 if dtype is torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), ref, rtol=1e-4, atol=1e-5)

    def test_gradient_only_to_student(self, name):
        s,t,y = make()
        call(get_loss(name), s.requires_grad_(), t.requires_grad_(), y).backward()
        assert t.grad is None and s.grad.isfinite().all() and s.grad.abs().sum()>0

    def test_extreme_logits(self, name):
        s,t,y = make()
        s = (s*1e4).requires_grad_()
        out = call(get_loss(name), s, -t*1e4, y)
        out.backward()
        assert out.isfinite() and s.grad.isfinite().all()

    def test_dense(self, name):
        "`(n,c,h,w)` with the class axis anywhere"
        if 'axis' not in type(get_loss(name)).hypers: return
        s,t,y = make((3,5,2,4))
        a,b = call(get_loss(name), s, t, y),call(get_loss(name, axis=-1), s.movedim(1,-1), t.movedim(1,-1), y)
        torch.testing.assert_close(a, b)
        assert call(get_loss(name, reduction='none'), s, t, y).shape==(3,)

    def test_bad_input(self, name):
        l,(s,t,y) = get_loss(name),make()
        with pytest.raises(ValueError, match='shape'): call(l, s, t[:,:1], y)
        with pytest.raises(ValueError): call(l, s[:0], t[:0], y[:0])
        with pytest.raises(ValueError): call(l, s[:,:0], t[:,:0], y)
        if name not in no_classes:
            with pytest.raises(ValueError): call(l, s[0], t[0], y)
        with pytest.raises(TypeError): call(l, s, (t,t), y)
        if 'T' in l.hypers:
            with pytest.raises(ValueError, match='`T`'): call(get_loss(name, T=0), s, t, y)
        if 'targ' in l.needs:
            with pytest.raises(ValueError, match='label'): l(s, t)

    def test_pickle(self, name):
        "`learn.export` pickles the loss"
        l,(s,t,y) = get_loss(name),make()
        torch.testing.assert_close(call(pickle.loads(pickle.dumps(l)), s, t, y), call(l, s, t, y))

def test_default_temperatures():
    "5 as measured, where no paper says otherwise; what a paper or its code gives"
    has = {nm:inspect.signature(type(get_loss(nm))).parameters['T'].default for nm in 'kd bkd rkl jsd dkd abkd mlkd skd_instance nkd wsld lskd ttm'.split()}
    assert has==dict(kd=5, bkd=5, rkl=5, jsd=5, dkd=4, abkd=4, mlkd=4, skd_instance=4, nkd=1, wsld=2, lskd=2, ttm=10)
    from fastkd.losses.all import sparse_kd_loss
    assert inspect.signature(sparse_kd_loss).parameters['T'].default==5
