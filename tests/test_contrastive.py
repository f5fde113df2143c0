"CRD and its bank, SSKD: loops, torchdistill where it is installed, state, several processes, traps"
import copy,inspect,io,os,pickle,subprocess,sys
from pathlib import Path
import pytest,torch,torch.nn.functional as F
import fastkd.losses.all
from fastkd.core import KDModule,get_loss,list_losses,loss_needs
from fastkd.losses.sskd import _kept
from fastkd.losses.contrastive import *

close,buffers = torch.testing.assert_close,('bank_s','bank_t','item_targ','log_Z')
def gen(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0, dtype=torch.float64): return torch.randn(*shape, generator=gen(seed), dtype=torch.float64).to(dtype)
def batch(n=4, d=6, N=20, k=5, seed=0, dtype=torch.float64):
    g = gen(seed)
    return *(torch.randn(n, d, generator=g, dtype=torch.float64).to(dtype) for _ in range(2)),torch.randperm(N, generator=g)[:n],torch.randint(N, (n,k), generator=g)
def same_state(a, b):
    for k in buffers: close(getattr(a, k), getattr(b, k), rtol=0, atol=0, equal_nan=True)
def snapshot(c): return {k:getattr(c, k).clone() for k in buffers}

# ---------------------------------------------------------------- CRD: values
def naive(fs, ft, bs, bt, index, neg, Z=None, T=.07, eps=0.):
    "Loss of the paper with the authors' Z, pair by pair"
    fs,ft,N,k = F.normalize(fs),F.normalize(ft),len(bs),neg.shape[1]
    idx = [[i,*n] for i,n in zip(index.tolist(),neg.tolist())]
    es = [[[torch.exp(v[i]@b[j]/T) for j in idx[i]] for i in range(len(v))] for v,b in ((fs,bt),(ft,bs))]
    if Z is None: Z = [sum(sum(r) for r in o).detach()/(len(o)*(k+1))*N for o in es]
    total = 0.
    for o,z in zip(es,Z):
        for r in o:
            total = total-(r[0]/z/(r[0]/z+k/N+eps)).log()-sum((k/N/(e/z+k/N+eps)).log() for e in r[1:])
    return total/len(fs),Z

@pytest.mark.parametrize('mode', ['paper','torchdistill'])
@pytest.mark.parametrize('k', [1,5,40]) # 1 collects rows, 40 multiplies with the whole bank
def test_crd_steps_against_loops(mode, k):
    c = CRDLoss(20, d=6, k=k, mode=mode, teach_grad=True).double()
    bs,bt,Z = c.bank_s.clone(),c.bank_t.clone(),None
    for step in range(5):
        fs,ft,index,neg = batch(k=k, seed=step)
        ls,lt = [o.clone().requires_grad_() for o in (fs,ft)]
        fs,ft = fs.requires_grad_(),ft.requires_grad_()
        v = c(fs, ft, None, index, neg)
        exp,Z = naive(ls, lt, bs, bt, index, neg, Z, eps=1e-7 if mode=='torchdistill' else 0.)
        close(v, exp, rtol=1e-10, atol=0)
        for a,b in zip(torch.autograd.grad(v, (fs,ft)), torch.autograd.grad(exp, (ls,lt))): close(a, b, rtol=1e-8, atol=1e-10)
        with torch.no_grad():
            for b,x in ((bs,fs),(bt,ft)):
                for i,j in enumerate(index): b[j] = F.normalize(.5*b[j]+.5*F.normalize(x[i], dim=0), dim=0)
        close(c.bank_s, bs, rtol=0, atol=1e-14); close(c.bank_t, bt, rtol=0, atol=1e-14)
        close(c.log_Z.exp(), torch.stack(Z), rtol=1e-10, atol=0)

def test_crd_torchdistill():
    m = pytest.importorskip('torchdistill.losses.mid_level')
    N,d,k = 50,12,7
    c,t = CRDLoss(N, d, k, mode='torchdistill', teach_grad=True).double(),m.CRDLoss('s', 'e', 't', d, N, k, N).double()
    t.params = torch.tensor([k,.07,-1,-1,.5], dtype=torch.float64) # made in float32
    t.memory_v1.copy_(c.bank_s); t.memory_v2.copy_(c.bank_t)
    for step in range(5):
        fs,ft,index,neg = batch(6, d, N, k, seed=step)
        fs,ft = [F.normalize(o).requires_grad_() for o in (fs,ft)]
        v = c(fs, ft, None, index, neg)
        tv = t({'s':{'output':fs},'e':{'input':dict(pos_idx=index, contrast_idx=torch.cat([index[:,None],neg], 1))}}, {'t':{'output':ft}})
        close(v, tv[0], rtol=0, atol=1e-9)
        gs,tg = torch.autograd.grad(v, (fs,ft)),torch.autograd.grad(tv, (fs,ft), retain_graph=True)
        for g,o,x in zip(gs, tg, (fs,ft)): close(g, o-(o*x).sum(1, keepdim=True)*x, rtol=0, atol=1e-9) # what normalising leaves of it
        close(c.bank_s, t.memory_v1, rtol=0, atol=1e-12); close(c.bank_t, t.memory_v2, rtol=0, atol=1e-12)

@pytest.mark.parametrize('k', [1,30])
def test_crd_gradcheck(k):
    fs,ft,index,neg = batch(3, 4, 20, k)
    bs,bt = randn(20, 4, seed=8),randn(20, 4, seed=9)
    f = lambda s,t: crd_loss(s, t, bs, bt, index, neg, T=.5, log_Z=torch.tensor([1.,2.]).double(), reduction='none', teach_grad=True)
    assert torch.autograd.gradcheck(f, (fs.requires_grad_(),ft.requires_grad_()))

def test_crd_reductions():
    fs,ft,index,neg = batch()
    bs,bt = randn(20, 6, seed=8),randn(20, 6, seed=9)
    each,mean,total = (crd_loss(fs, ft, bs, bt, index, neg, reduction=r) for r in ('none','mean','sum'))
    assert each.shape==(4,)
    close(each.mean(), mean); close(each.sum(), total)
    a,b = [CRDLoss(20, d=6, k=5, reduction=r).double() for r in ('none','mean')]
    close(a(fs, ft, None, index, neg).mean(), b(fs, ft, None, index, neg))

def test_teacher_gets_a_gradient_only_where_asked():
    for ask in (False,True):
        fs,ft,index,neg = batch(dtype=torch.float32)
        CRDLoss(20, d=6, k=5, teach_grad=ask)(fs.requires_grad_(), ft.requires_grad_(), None, index, neg).backward()
        assert fs.grad.abs().sum()>0 and (ft.grad is not None)==ask

def test_length_of_embeddings_does_not_matter():
    fs,ft,index,neg = batch()
    a,b = [CRDLoss(20, d=6, k=5).double() for _ in range(2)]
    close(a(fs, ft, None, index, neg), b(fs*9, ft/7, None, index, neg))
    for k in ('bank_s','bank_t','log_Z'): close(getattr(a, k), getattr(b, k))

# ---------------------------------------------------------------- CRD: the bank
def test_first_bank():
    c = CRDLoss(5000, d=48, k=4)
    for b in (c.bank_s,c.bank_t):
        assert b.shape==(5000,48) and b.abs().max()<=.25 and b.abs().max()>.248 and b.mean().abs()<.002 # sqrt(3/48)
        close(b.std(), torch.tensor(.25/3**.5), rtol=.01, atol=0); close(b.norm(dim=1).mean(), torch.tensor(1.), rtol=.02, atol=0)
    assert not torch.equal(c.bank_s, c.bank_t)
    state = torch.random.get_rng_state()
    same_state(c, CRDLoss(5000, d=48, k=4))
    assert torch.equal(state, torch.random.get_rng_state()) and not torch.equal(c.bank_s, CRDLoss(5000, d=48, k=4, seed=1).bank_s)

def test_eval_changes_nothing():
    c,(fs,ft,index,neg) = CRDLoss(20, d=6, k=5),batch(dtype=torch.float32)
    y = index%3
    was = snapshot(c)
    a = c.eval()(fs.requires_grad_(), ft, y, index)
    a.backward()
    assert all(torch.equal(was[k].nan_to_num(), getattr(c, k).nan_to_num()) for k in buffers)
    c.train()(fs, ft, y, index)
    assert not c.log_Z.isnan().any() and (c.item_targ[index]==y).all() and (c.bank_s[index]!=was['bank_s'][index]).all()
    rest = [i for i in range(20) if i not in index]
    assert torch.equal(c.bank_s[rest], was['bank_s'][rest]) and (c.item_targ[rest]==-1).all()
    was = snapshot(c)
    c.eval()(fs, ft, y, index)
    assert all(torch.equal(was[k], getattr(c, k)) for k in buffers)

@pytest.mark.parametrize('k', [1,40])
def test_update_before_backward(k):
    "The bank changes after the forward pass; the gradient is still that of the old one"
    fs,ft,index,neg = batch(k=k)
    c,d = [CRDLoss(20, d=6, k=k).double() for _ in range(2)]
    a,b = fs.clone().requires_grad_(),fs.clone().requires_grad_()
    c(a, ft, None, index, neg).backward()
    d.eval()(b, ft, None, index, neg).backward()
    close(a.grad, b.grad)

def test_out_of_the_graph():
    c,(fs,ft,index,neg) = CRDLoss(20, d=6, k=5),batch(dtype=torch.float32)
    c(fs.requires_grad_(), ft, index%3, index)
    assert not list(c.parameters()) and not any(b.requires_grad or b.grad_fn for b in c.buffers())
    d = copy.deepcopy(c)
    same_state(c, d)
    torch.manual_seed(0); a = c(fs, ft, index%3, index)
    same_state(pickle.loads(pickle.dumps(c)), c)
    torch.manual_seed(0); close(d(fs, ft, index%3, index), a)
    same_state(c, d)

def test_save_and_load():
    c,(fs,ft,index,neg) = CRDLoss(20, d=6, k=5),batch(dtype=torch.float32)
    c(fs, ft, index%3, index)
    f = io.BytesIO()
    torch.save(c.state_dict(), f)
    for new in (CRDLoss(20, d=6, k=5, seed=3), CRDLoss(d=6, k=5), torch.nn.ModuleDict(dict(x=CRDLoss(d=6, k=5)))):
        f.seek(0)
        sd = torch.load(f)
        if isinstance(new, torch.nn.ModuleDict):
            new.load_state_dict({f'x.{k}':v for k,v in sd.items()})
            new = new['x']
        else: new.load_state_dict(sd)
        same_state(new, c)
        assert new.n_items==20
        a,b = copy.deepcopy(c),new
        for step in range(2):
            torch.manual_seed(step); va = a(fs, ft, index%3, index)
            torch.manual_seed(step); close(b(fs, ft, index%3, index), va, rtol=0, atol=0)
        same_state(a, b)
    with pytest.raises(RuntimeError, match='size mismatch'): CRDLoss(21, d=6, k=5).load_state_dict(c.state_dict())

def test_an_item_twice_counts_with_its_mean():
    c = CRDLoss(20, d=6, k=5).double()
    fs,ft,_,_ = batch()
    was = c.bank_s[7].clone()
    c.update(torch.tensor([7,3,7,7]), fs, ft)
    close(c.bank_s[7], F.normalize(.5*was+.5*F.normalize(fs)[[0,2,3]].mean(0), dim=0))

def test_moves():
    c = CRDLoss(20, d=6, k=5)
    assert all(b.dtype in (torch.float64,torch.int64) for b in c.double().buffers())
    assert CRDLoss(20, d=6, k=5).to('meta').bank_s.device.type=='meta'

# ---------------------------------------------------------------- CRD: negatives
def test_negatives_of_other_classes():
    y = torch.tensor([5]*50+[-3]*7+[100]*40+[7]*3)[torch.randperm(100, generator=gen())]
    c = CRDLoss(100, d=4, k=6000, labels=y)
    index = torch.arange(12)
    torch.manual_seed(0)
    neg = c.negatives(index, y[index])
    assert neg.shape==(12,6000) and not (y[neg]==y[index,None]).any()
    for r,i in zip(neg,index):
        n = r.bincount(minlength=100)[y!=y[i]].double()
        assert (n>0).all() and ((n-n.mean())**2/n.mean()).sum()<len(n)+5*(2*len(n))**.5 # chi²

def test_labels_are_learned():
    y = torch.arange(60)%3
    c = CRDLoss(60, d=6, k=500)
    g = gen()
    for i in torch.randperm(60, generator=g).split(20):
        e = torch.randn(20, 6, generator=g)
        c(e, e, y[i], i)
        known = c.item_targ>=0
        neg = c.negatives(i, y[i])
        assert not (known[neg]&(y[neg]==y[i,None])).any()
    assert torch.equal(c.item_targ, y)
    assert torch.equal(c.negatives(torch.arange(3), y[:3])%3!=torch.arange(3)[:,None], torch.ones(3,500).bool())

def test_without_classes():
    c = CRDLoss(30, d=6, k=3000, by_class=False)
    neg = c.negatives(torch.tensor([0,17,29]))
    for r,i in zip(neg, (0,17,29)): assert set(r.tolist())==set(range(30))-{i}
    fs,ft,index,_ = batch(dtype=torch.float32)
    assert c(fs, ft, index=index).isfinite() and c.needs==('index',) and not c.needs_labels

def test_no_loop_over_items():
    "A bank of 200 000 items of 10 000 classes: built, and negatives drawn, without Python going over them"
    y = torch.randint(10_000, (200_000,), generator=gen())
    n = 0
    def count(*a):
        nonlocal n; n += 1
    sys.setprofile(count)
    try:
        c = CRDLoss(200_000, d=8, k=64, labels=y)
        c.negatives(torch.arange(64), y[:64])
    finally: sys.setprofile(None)
    assert n<2000,n

# ---------------------------------------------------------------- CRD: several processes
worker = '''
import sys,torch,torch.distributed as dist
from fastkd.losses.contrastive import *
rank,path = int(sys.argv[1]),sys.argv[2]
dist.init_process_group('gloo', init_method=f'file://{path}/init', rank=rank, world_size=2)
c = CRDLoss(30, d=6, k=5)
g = torch.Generator().manual_seed(0)
for n in (8,7,2):
    e,i = torch.randn(2,n,6,generator=g),torch.randperm(30,generator=g)[:n]
    mine = slice(0,n//2) if rank==0 else slice(n//2,n)
    torch.manual_seed(100+rank)
    c(e[0][mine], e[1][mine], (i%3)[mine], i[mine])
torch.save(c.state_dict(), f'{path}/{rank}.pt')
dist.destroy_process_group()
'''
def test_processes_keep_one_bank(tmp_path):
    env = {**os.environ, 'PYTHONPATH':str(Path(__file__).resolve().parent.parent), 'OMP_NUM_THREADS':'1'}
    ps = [subprocess.Popen([sys.executable, '-c', worker, str(r), str(tmp_path)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)]
    out = [p.communicate(timeout=300)[0] for p in ps]
    assert all(p.returncode==0 for p in ps), out
    a,b = [torch.load(tmp_path/f'{r}.pt') for r in range(2)]
    one,g = CRDLoss(30, d=6, k=5),gen()
    for n in (8,7,2):
        e,i = torch.randn(2, n, 6, generator=g),torch.randperm(30, generator=g)[:n]
        one(e[0], e[1], i%3, i)
    for k in buffers: close(a[k], b[k], rtol=0, atol=0)
    for k in ('bank_s','bank_t','item_targ'): close(a[k], getattr(one, k), rtol=0, atol=1e-6)
    assert a['log_Z'].isfinite().all()

# ---------------------------------------------------------------- CRD: by name, later, wrong
def test_by_name_and_later():
    c = get_loss('crd', d=6, k=5)
    assert isinstance(c, KDModule) and loss_needs(c)==('targ','index') and 'n_items=None' in repr(c)
    fs,ft,index,_ = batch(dtype=torch.float32)
    with pytest.raises(ValueError, match='len\\(dls.train_ds\\)'): c(fs, ft, index%3, index)
    assert c.set_items(20) is c and c.n_items==20 and c(fs, ft, index%3, index).isfinite()
    c.set_items(15)
    with pytest.raises(ValueError, match='20 items is too small for 21'): c.set_items(21)
    same_state(CRDLoss(d=6, k=5).set_items(20), CRDLoss(20, d=6, k=5))
    assert CRDLoss(d=6, k=5, labels=torch.arange(20)).n_items==20
    with pytest.raises(TypeError): CRDLoss(20, no_such=1)

def test_crd_bad_input():
    c,(fs,ft,index,_) = CRDLoss(20, d=6, k=5),batch(dtype=torch.float32)
    y = index%3
    was = snapshot(c)
    for msg,a in {'0 to 19':(fs,ft,y,index+20), 'from -1':(fs,ft,y,index*0-1), 'needs `index`':(fs,ft,y), 'needs `targ`':(fs,ft,None,index), '`index`, integers \\(4,\\), got torch.float32':(fs,ft,y,index.float()),
        'integers \\(4,\\)':(fs,ft,y,index[:3]), 'd=6':(fs[:,:5],ft[:,:5],y,index), 'one shape':(fs,ft[:,:5],y,index), '\\(n,d\\)':(fs[:,:,None],ft[:,:,None],y,index)}.items():
        with pytest.raises(ValueError, match=msg): c(*a)
    with pytest.raises(TypeError, match='NoneType'): c(fs, None, y, index)
    assert all(torch.equal(was[k].nan_to_num(), getattr(c, k).nan_to_num()) for k in buffers)
    with pytest.raises(ValueError, match='by_class=False'): CRDLoss(4, d=6, k=5)(fs, ft, y*0, torch.arange(4))
    c(fs, ft, y, index)
    with pytest.raises(ValueError, match='another label'): c(fs, ft, y+1, index)
    with pytest.raises(ValueError, match='another label'): CRDLoss(20, d=6, k=5, labels=torch.zeros(20).long())(fs, ft, y+1, index)
    for bad in (dict(T=0), dict(k=0), dict(d=0), dict(momentum=1.5), dict(n_items=1), dict(labels=torch.zeros(7).long()), dict(labels=torch.zeros(20))):
        with pytest.raises(ValueError): CRDLoss(**{**dict(n_items=20, d=6, k=5), **bad})
    with pytest.raises(ValueError, match='mode'): CRDLoss(20, d=6, k=5, mode='code')(fs, ft, y, index)

@pytest.mark.parametrize('T', [.07,1e-3,10.])
@pytest.mark.parametrize('trap', [lambda e: e*0, lambda e: e*0+1, lambda e: e*1e4, lambda e: e*1e-20, lambda e: e.half(), lambda e: e.bfloat16(), lambda e: (e*1e4).half(), lambda e: e[:1]])
def test_crd_traps(trap, T):
    fs,ft,index,_ = batch(dtype=torch.float32)
    c = CRDLoss(20, d=6, k=5, T=T)
    for other in (ft,fs):
        for _ in range(3):
            s = trap(fs).detach().requires_grad_()
            v = c(s, trap(other), (index%3)[:len(s)], index[:len(s)])
            v.backward()
            assert v.isfinite() and v.dtype==torch.float32 and s.grad.isfinite().all() and c.bank_s.isfinite().all() and c.bank_t.isfinite().all()

def test_crd_autocast():
    fs,ft,index,neg = batch(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16): a = CRDLoss(20, d=6, k=5)(fs, ft, None, index, neg)
    close(a, CRDLoss(20, d=6, k=5)(fs, ft, None, index, neg))

# ---------------------------------------------------------------- SSKD
def test_rotate4():
    x = randn(3, 2, 4, 4)
    x4 = rotate4(x)
    assert x4.shape==(12,2,4,4)
    for i in range(3):
        for k in range(4): assert torch.equal(x4[4*i+k], torch.rot90(x[i], k, (1,2)))
    assert x4[1,0,0,0]==x[0,0,0,-1] # a quarter turn to the left: the right upper corner becomes the left upper one
    for bad in (x[0], x[:,:,:3], None):
        with pytest.raises(ValueError, match='square'): rotate4(bad)

def aux_loop(z):
    n,l = len(z)//4,0.
    for j in [j for j in range(4*n) if j%4]:
        cos = torch.stack([F.cosine_similarity(z[j], z[4*i], 0) for i in range(n)])
        l = l-cos.log_softmax(0)[j//4]/(3*n)
    return l
def test_aux_sskd():
    z = randn(20, 5).requires_grad_()
    close(aux_sskd_loss(z), aux_loop(z))
    assert torch.autograd.gradcheck(aux_sskd_loss, (z,))
    each = AuxSSKDLoss(reduction='none')(z)
    assert each.shape==(5,)
    close(each.mean(), AuxSSKDLoss()(z, None)); close(each.sum(), aux_sskd_loss(z, reduction='sum'))
    m = pytest.importorskip('torchdistill.losses.mid_level')
    a,b = aux_sskd_loss(z),m.AuxSSKDLoss()({}, {'ss_module':{'output':z}})
    close(a, b, rtol=0, atol=1e-12); close(torch.autograd.grad(a, z)[0], torch.autograd.grad(b, z)[0], rtol=0, atol=1e-12)

def best(rows, ys, ratio):
    "The authors' ranking, with a stable order"
    rank = [r.argsort(descending=True, stable=True).tolist().index(k) for r,k in zip(rows,ys)]
    wrong = sum(o>0 for o in rank)
    return sorted(range(len(rank)), key=lambda i: rank[i])[:len(rank)-wrong+int(wrong*ratio)]
def sskd_loop(zs, es, zt, et, y, w=(.1,.9,10.,2.7), Ts=(4.,.5,4.), ratio_ss=.75, ratio_tf=1.):
    n,y = len(y),y.tolist()
    up,tu = [i for i in range(4*n) if i%4==0],[i for i in range(4*n) if i%4]
    def kl(s, t, T): return T*T*((t/T).softmax(0)*((t/T).log_softmax(0)-(s/T).log_softmax(0))).sum()
    def mean(o): return sum(o)/max(len(o), 1)
    cs,ct = [[F.cosine_similarity(e[j][None], e[up]) for j in tu] for e in (es,et)]
    ks,kt = best(ct, [j//3 for j in range(3*n)], ratio_ss),best([zt[i] for i in tu], [y[j//3] for j in range(3*n)], ratio_tf)
    return (w[0]*mean([-zs[i].log_softmax(0)[k] for i,k in zip(up,y)])+w[1]*mean([kl(zs[i],zt[i],Ts[0]) for i in up])
        +w[2]*mean([kl(cs[j],ct[j],Ts[1]) for j in ks])+w[3]*mean([kl(zs[tu[j]],zt[tu[j]],Ts[2]) for j in kt]))
ratios = [dict(), dict(ratio_ss=0., ratio_tf=0.), dict(ratio_ss=.3, ratio_tf=.5), dict(ratio_ss=1., ratio_tf=.1)]
def sskd_batch(n=6, c=7, seed=0): return [randn(4*n, d, seed=seed+i) for i,d in enumerate((c,5,c,9))]+[torch.randint(c, (n,), generator=gen(seed))]

@pytest.mark.parametrize('kw', ratios)
@pytest.mark.parametrize('seed', range(3))
def test_sskd(kw, seed):
    zs,es,zt,et,y = sskd_batch(seed=10*seed)
    zs,es = zs.requires_grad_(),es.requires_grad_()
    a,b = sskd_loss((zs,es), [zt,et], y, **kw),sskd_loop(zs, es, zt, et, y, **kw)
    close(a, b)
    for g,h in zip(torch.autograd.grad(a, (zs,es), materialize_grads=True, retain_graph=True), torch.autograd.grad(b, (zs,es), materialize_grads=True)): close(g, h)
    each = sskd_loss((zs,es), (zt,et), y, reduction='none', **kw)
    assert each.shape==(6,)
    close(each.mean(), a); close(each.sum(), sskd_loss((zs,es), (zt,et), y, reduction='sum', **kw))

def test_sskd_parts():
    zs,es,zt,et,y = sskd_batch()
    off = dict(w_ce=0., w_kd=0., w_ss=0., w_tf=0.)
    for i,k in enumerate(off): close(sskd_loss((zs,es), (zt,et), y, **{**off, k:2.}), sskd_loop(zs, es, zt, et, y, w=[2. if j==i else 0. for j in range(4)]))
    close(sskd_loss((zs,es), (zt,et), y, T=2., T_ss=1., T_tf=3.), sskd_loop(zs, es, zt, et, y, Ts=(2.,1.,3.)))

@pytest.mark.parametrize('ratio_ss,ratio_tf', [(.75,1.),(.4,.3)])
def test_sskd_torchdistill(ratio_ss, ratio_tf):
    m = pytest.importorskip('torchdistill.losses.mid_level')
    zs,es,zt,et,y = sskd_batch(8)
    zs,es = zs.requires_grad_(),es.requires_grad_()
    t = m.SSKDLoss('l', 'l', 's', 's', 4., .5, 4., ratio_ss, ratio_tf, loss_weights=[.1,.9,10.,2.7])
    a,b = sskd_loss((zs,es), (zt,et), y, ratio_ss=ratio_ss, ratio_tf=ratio_tf, mode='torchdistill'),t({'l':{'output':zs},'s':{'output':es}}, {'l':{'output':zt},'s':{'output':et}}, y)
    close(a, b, rtol=0, atol=1e-10)
    for g,h in zip(torch.autograd.grad(a, (zs,es)), torch.autograd.grad(b, (zs,es))): close(g, h, rtol=0, atol=1e-10)

def test_sskd_keeps_the_first_of_equals():
    "Equal answers are ranked in the order of the classes, equal ranks in that of the items"
    z = torch.zeros(6, 3)
    assert _kept(z, torch.tensor([0,1,2,0,1,2]), 0.).tolist()==[True,False,False,True,False,False]
    assert _kept(z, torch.tensor([0,1,2,0,1,2]), .5).tolist()==[True,True,False,True,True,False]
    assert _kept(z, torch.tensor([2,1,2,0,1,2]), .2).tolist()==[False,True,False,True,False,False]

def test_sskd_teacher_and_labels():
    zs,es,zt,et,y = sskd_batch()
    for o in (zs,es,zt,et): o.requires_grad_()
    l = get_loss('sskd')
    l((zs,es), (zt,et), y).backward()
    assert zt.grad is None and et.grad is None and zs.grad.abs().sum()>0 and es.grad.abs().sum()>0 and l.needs==('targ',)
    with pytest.raises(ValueError, match='label'): l((zs,es), (zt,et))

def test_sskd_bad_input():
    zs,es,zt,et,y = sskd_batch()
    for msg,(s,t,yy) in {'four rotations':((zs[:6],es[:6]),(zt[:6],et[:6]),y[:1]), 'at least 2':((zs[:4],es[:4]),(zt[:4],et[:4]),y[:1]), 'different numbers':((zs,es[:8]),(zt,et),y),
        'items and classes':((zs[:,:5],es),(zt,et),y), 'integer labels \\(6,\\)':((zs,es),(zt,et),y[:4]), '\\(4n,d\\)':((zs,es[:,0]),(zt,et),y)}.items():
        with pytest.raises(ValueError, match=msg): sskd_loss(s, t, yy)
    for s in (zs, (zs,), (zs,es,es)):
        with pytest.raises(TypeError, match='two tensors of the student'): sskd_loss(s, (zt,et), y)
    for kw in (dict(ratio_ss=1.5), dict(ratio_tf=-1), dict(T=0), dict(T_ss=-1.), dict(reduction='avg'), dict(mode='code')):
        with pytest.raises(ValueError): sskd_loss((zs,es), (zt,et), y, **kw)
    with pytest.raises(ValueError, match='four rotations'): aux_sskd_loss(es[:7])
    with pytest.raises(ValueError, match='\\(4n,d\\)'): aux_sskd_loss(None)
    with pytest.raises(TypeError, match='no_such'): SSKDLoss(no_such=1)

@pytest.mark.parametrize('trap', [lambda e: e*0, lambda e: e*0+1, lambda e: e*1e4, lambda e: e*1e-20, lambda e: e.half(), lambda e: e.bfloat16(), lambda e: (e*1e3).half()])
def test_sskd_traps(trap):
    *a,y = sskd_batch()
    zs,es,zt,et = [trap(o.float()).detach().requires_grad_() for o in a]
    v = sskd_loss((zs,es), (zt,et), y)+aux_sskd_loss(es)
    v.backward()
    assert v.isfinite() and v.dtype==torch.float32 and zs.grad.isfinite().all() and es.grad.isfinite().all()

# ---------------------------------------------------------------- the contract
@pytest.mark.parametrize('name', ['sskd','aux_sskd'])
def test_pair(name):
    l = get_loss(name)
    ps = {k:p.default for k,p in inspect.signature(type(l).func).parameters.items()}
    assert list(ps)[:2]==['fs','ft']
    hypers = {k:v for k,v in ps.items() if k not in ('fs','ft','targ')}
    assert hypers=={k:p.default for k,p in inspect.signature(type(l)).parameters.items()}=={k:getattr(l, k) for k in hypers} and hypers['reduction']=='mean'
    assert pickle.loads(pickle.dumps(l)).hypers==l.hypers

def test_registered(): assert {'crd','sskd','aux_sskd','rkd','sp','pkt','cc','cka','skd_direction'}<=set(list_losses())
