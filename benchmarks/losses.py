"""What do the losses between layers cost? Each against the same formula written down plainly, timed in turns in one run.

    python benchmarks/losses.py                       # every feature, relation and contrastive loss, ten minutes on one core
    python benchmarks/losses.py --names at,rkd        # some of them
    python benchmarks/losses.py --peer                # against torchdistill, if it is installed
    python benchmarks/losses.py --at                  # a training step with two attention terms, against a loop with the same hooks

A sample is forward and backward to the student's feature, for 32 items of 512×7×7 and of 64×32×32. The plain forms below are vectorised torch without any care for
dead channels, equal items, half precision or wrong shapes; they give the same value, which is checked. `--at` runs a training step in three forms: `fastkd` with
`KnowledgeDistillation` and two Terms, `fastai` with the same hooks, teacher and formula in a callback of 20 lines, and `bare`, a loop without fastai.

One thread, CPU time of this process (on a GPU, wall time), forms in random order, medians; brackets are 95% bootstrap intervals of the ratio over rounds."""
import csv,ctypes,gc,time
from copy import deepcopy
from fastai.vision.all import *
from fastcore.script import call_parse
from torchvision.models import resnet18,resnet34
from fastkd.all import *
from fastkd.test_utils import digits_dls,tiny_cnn
from step import inside_fits,random_dls
from store import ratio

sizes,n_items,n_classes = {'512x7x7':(512,7,7), '64x32x32':(64,32,32)},200_000,100

# ---------------------------------------------------------------- the formulas, as one would write them
_plain = {}
def plain(f): _plain[f.__name__] = f; return f

@plain
def hint(s, t): return F.mse_loss(s, t)
@plain
def simkd(s, t): return F.mse_loss(s, t)
@plain
def hidden(s, t): return F.mse_loss(s, t)
@plain
def wkd_feat(s, t):
    def sd(x): return (x.var((2,3))+1e-5).sqrt()
    return (2*(s.mean((2,3))-t.mean((2,3))).pow(2)+(sd(s)-sd(t)).pow(2)).sum(1).mean()
def amap(x): return F.normalize(x.pow(2).mean(1).flatten(1))
@plain
def at(s, t): return (amap(s)-amap(t)).norm(dim=1).mean()
@plain
def attention(s, t): return (amap(s)-amap(t)).pow(2).mean()
@plain
def catkd(s, t):
    def cam(x): return F.normalize(F.adaptive_avg_pool2d(x, 2).flatten(2), dim=2)
    return F.mse_loss(cam(s), cam(t))
@plain
def ab(s, t): return torch.where(t>0, 1-s, 1+s).relu().pow(2).sum()/len(s)
@plain
def ofd(s, t):
    neg = (t<0).float()
    t = torch.maximum(t, ((t*neg).sum((0,2,3))/neg.sum((0,2,3)))[:,None,None])
    return ((s-t).pow(2)*((s>t)|(t>0))).sum()/len(s)
@plain
def fsp(s, t):
    def flow(a, b): return a.flatten(2)@b.flatten(2).mT/a[0,0].numel()
    return (flow(*s)-flow(*t)).pow(2).sum((1,2)).mean()
@plain
def nst(s, t):
    s,t = F.normalize(s.flatten(2), dim=2),F.normalize(t.flatten(2), dim=2)
    def k(a, b): return (a@b.mT).pow(2).mean((1,2))
    return (k(s,s)+k(t,t)-2*k(s,t)).mean()
@plain
def affinity(s, t):
    def gram(x): x = F.normalize(x.flatten(2), dim=1); return x.mT@x
    return F.mse_loss(gram(s), gram(t))
@plain
def ickd(s, t):
    def corr(x): x = x.flatten(2); return F.normalize(x@x.mT, dim=2)
    return F.mse_loss(corr(s), corr(t))
@plain
def vid(s, t): return (((s[0]-t).pow(2)/s[1]+s[1].log())/2).mean()
@plain
def pad(s, t): return ((t-s[0]).pow(2)/(1e-6+s[1].exp())+s[1]).mean()
@plain
def ft(s, t): return (F.normalize(s.flatten(1))-F.normalize(t.flatten(1))).abs().sum(1).mean()
@plain
def kta(s, t): return ft(s, t)
@plain
def norm(s, t): return s.flatten(1).abs().sum(1).mean()
@plain
def reviewkd(s, t):
    ks = [k for k in (4,2,1) if k<s.shape[2]]
    parts = [F.mse_loss(s, t)]+[F.mse_loss(F.adaptive_avg_pool2d(s, k), F.adaptive_avg_pool2d(t, k)) for k in ks]
    return sum(.5**i*o for i,o in enumerate(parts))/sum(.5**i for i in range(len(parts)))
@plain
def mgd(s, t, net): return 7e-5*F.mse_loss(net(s*(torch.rand(*s.shape[:2], 1, 1, device=s.device)>=.15)), t, reduction='sum')/len(s)
@plain
def srd(s, t): return 2*(s-t).abs().pow(4).sum().log()
@plain
def nd(s, t, targ, centers):
    return (1-(s*F.normalize(centers)[targ]).sum(1)/torch.maximum(s.norm(dim=1), t.norm(dim=1))).mean()
@plain
def dist_plus(s, t):
    def rho(a, b, dim): return F.cosine_similarity(a-a.mean(dim, keepdim=True), b-b.mean(dim, keepdim=True), dim)
    (fs,zs),(ft,zt) = s,t
    p,q = zs.softmax(1),zt.softmax(1)
    return 4-rho(p, q, 1).mean()-rho(p, q, 0).mean()-rho(fs, ft, 1).mean()-rho(fs.sum(1).flatten(1), ft.sum(1).flatten(1), 0).mean()
@plain
def rkd(s, t):
    def parts(x):
        x = x.flatten(1)
        d,e = torch.cdist(x, x),F.normalize(x[None]-x[:,None], dim=2)
        return d/d[d>0].mean(),e@e.mT
    (ds,es),(dt,et) = parts(s),parts(t)
    return F.smooth_l1_loss(ds, dt)+2*F.smooth_l1_loss(es, et)
@plain
def sp(s, t):
    def g(x): x = x.flatten(1); return F.normalize(x@x.T)
    return F.mse_loss(g(s), g(t))
@plain
def pkt(s, t):
    def p(x):
        x = F.normalize(x.flatten(1))
        k = ((x@x.T+1)/2)*(1-torch.eye(len(x), device=x.device))
        return k/k.sum(1, keepdim=True)
    q,p = p(s),p(t)
    return (p*((p+1e-7)/(q+1e-7)).log()).sum(1).mean()
@plain
def cc(s, t):
    def k(x):
        g = F.normalize(x.flatten(1))
        g = .8*(g@g.T)
        return math.exp(-.8)*(1+g+g**2/2)
    return F.mse_loss(k(s), k(t))
@plain
def cka(s, t):
    def g(x): x = x.flatten(1); x = x-x.mean(0); return x@x.T
    k,l = g(s),g(t)
    return 1-(k*l).sum()/(k.norm()*l.norm())
@plain
def skd_direction(s, t):
    def g(x): x = F.normalize(x); return x@x.T
    d = g(s)-g(t)
    return (d@torch.linalg.inv(torch.cov(d.T)+.1*torch.eye(len(d), device=d.device))*d).sum(1).sqrt().mean()
def turned(z): return F.normalize(z.unflatten(0, (-1,4))[:,1:].flatten(0, 1))@F.normalize(z[::4]).T
def own_upright(n, x): return torch.arange(n, device=x.device).repeat_interleave(3)
@plain
def aux_sskd(s, t): return F.cross_entropy(turned(s), own_upright(len(s)//4, s))
@plain
def sskd(s, t, targ):
    (zs,es),(zt,et),n = s,t,len(targ)
    def kl(a, b, T): return T**2*(b.div(T).softmax(1)*(b.div(T).log_softmax(1)-a.div(T).log_softmax(1))).sum(1)
    def kept(z, y, r):
        rank = (z>z.gather(1, y[:,None])).sum(1)
        keep = torch.zeros(len(z), device=z.device)
        keep[rank.argsort(stable=True)[:(rank==0).sum()+((rank>0).sum()*r).long()]] = 1
        return keep
    def kl_kept(a, b, T, y, r): return (kl(a, b, T)*(keep:=kept(b, y, r))).sum()/keep.sum()
    def aug(z): return z.unflatten(0, (-1,4))[:,1:].flatten(0, 1)
    return (.1*F.cross_entropy(zs[::4], targ)+.9*kl(zs[::4], zt[::4], 4).mean()+10*kl_kept(turned(es), turned(et), .5, own_upright(n, zs), .75)
        +2.7*kl_kept(aug(zs), aug(zt), 4, targ.repeat_interleave(3), 1.))

class PlainCRD:
    "CRD from all items but for its own; the first call sets Z"
    def __init__(self, n_items, d=128, k=16384, T=.07):
        self.n,self.k,self.T,self.Z = n_items,k,T,[None,None]
        self.banks = [(torch.rand(n_items, d)*2-1)*math.sqrt(3/d) for _ in range(2)]
    def to(self, device): self.banks = [o.to(device) for o in self.banks]; return self
    def __call__(self, s, t, targ, index):
        idx,m,loss = torch.cat([index[:,None],torch.randint(self.n, (len(s),self.k), device=s.device)], 1),self.k/self.n,0.
        vs = [F.normalize(s),F.normalize(t)]
        for i,(v,bank) in enumerate(zip(vs, self.banks[::-1])):
            o = ((bank[idx]@v[:,:,None])[...,0]/self.T).exp()
            if self.Z[i] is None: self.Z[i] = o.mean().item()*self.n
            o = o/self.Z[i]
            loss = loss-((o[:,0]/(o[:,0]+m)).log()+(m/(o[:,1:]+m)).log().sum(1)).mean()
        for v,bank in zip(vs, self.banks): bank[index] = F.normalize(.5*bank[index]+.5*v.detach())
        return loss

# ---------------------------------------------------------------- what goes in
groups = ('features','projected','relations','contrastive')
def all_names(): return [k for g in groups for k in list_losses() if type(get_loss(k)).__module__==f'fastkd.losses.{g}']

def tree(f, o): return [tree(f, p) for p in o] if isinstance(o, (list,tuple)) else f(o)
def leaves(o): return [o] if isinstance(o, Tensor) else [q for p in o for q in leaves(p)]

def case(name, c, h, w, bs, device):
    "Loss, plain form, features of both sides and what else they get"
    torch.manual_seed(0)
    def r(*a): return torch.randn(bs, *a, device=device)
    s,t,y,kw = r(c,h,w),r(c,h,w),torch.randint(n_classes, (bs,), device=device),{}
    l,p = (get_loss(name) if name not in ('mgd','nd','crd') else None),_plain.get(name)
    if name=='fsp': s,t = [s,r(c,h,w)],[t,r(c,h,w)]
    if name=='vid': s = [s,torch.rand(1, c, 1, 1, device=device)+.5]
    if name=='pad': s = [s,r(c,h,w)]
    if name in ('srd','nd','skd_direction','aux_sskd','sskd'): s,t = [o.mean((2,3))*8 for o in (s,t)]
    if name=='dist_plus': s,t = [s,r(n_classes)],[t,r(n_classes)]
    if name=='mgd':
        net = mgd_generator(c).to(device).requires_grad_(False)
        l,p = MGDLoss(net),partial(p, net=net)
    if name=='nd':
        ctr = torch.randn(n_classes, c, device=device)
        l,p,kw = NDLoss(ctr),partial(p, centers=ctr),dict(targ=y)
    if name=='sskd': s,t,kw = [r(n_classes),s],[r(n_classes),t],dict(targ=y[:bs//4])
    if name=='crd':
        s,t,lab = r(128),r(128),torch.randint(n_classes, (n_items,))
        kw = dict(index=torch.randperm(n_items)[:bs].to(device))
        kw['targ'] = lab.to(device)[kw['index']]
        l,p = CRDLoss(n_items, labels=lab).to(device),PlainCRD(n_items).to(device)
    if p is None: raise ValueError(f"the loss {name!r} has no plain form here: add one to benchmarks/losses.py")
    return l,p,tree(lambda o: o.requires_grad_(), s),t,kw

# ---------------------------------------------------------------- the clock
def clock(f, reps, device):
    if device.type=='cuda': torch.cuda.synchronize()
    now = time.perf_counter if device.type=='cuda' else time.process_time
    t = now()
    for _ in range(reps): f()
    if device.type=='cuda': torch.cuda.synchronize()
    return (now()-t)*1e3/reps

def keep_heap():
    "Ask glibc not to hand freed memory back: whether it does depends on chance, and fetching it again costs as much as a small loss"
    try:
        for opt,v in ((-1,2**30),(-3,2**29)): ctypes.CDLL(None).mallopt(opt, v)
    except (OSError,AttributeError,TypeError): pass

def race(forms, device, rounds, secs=5., min_ms=10.):
    "Times `(rounds, forms)` in ms, the forms of a round in random order; of slow forms fewer rounds, at least 5"
    rng,rows = random.Random(0),[]
    for f in forms: f()
    ms = [clock(f, 1, device) for f in forms]
    # as many calls of each in a sample: the first finds cold caches
    reps = math.ceil(min_ms/min(max(o, .01) for o in ms))
    for i in range(max(5, min(rounds, int(secs*1e3/sum(ms)/reps)))+1):
        gc.collect()
        t = {k:clock(forms[k], reps, device) for k in rng.sample(range(len(forms)), len(forms))}
        rows.append([t[k] for k in range(len(forms))])
    return np.array(rows[1:])

def both(f, s, *args, **kw):
    "Value and gradients"
    v = f(s, *args, **kw)
    return v.detach(),torch.autograd.grad(v.sum(), leaves(s))

def row(part, name, size, times, names=('ours','plain')):
    "Print one line; what goes into the file"
    r,lo,hi = ratio(times, 0, 1)
    m = np.median(times, 0)
    print(f"{part:6} {name:16} {size:14} {names[0]} {m[0]:9.3f} ms  {names[1]} {m[1]:9.3f} ms  ratio {r:.3f} ({lo:.3f}-{hi:.3f})", flush=True)
    return dict(part=part, loss=name, size=size, form=names[0], against=names[1], ms=m[0].round(4), ms_against=m[1].round(4),
        ratio=round(r, 4), low=round(lo, 4), high=round(hi, 4), rounds=len(times))

def against_plain(names, rounds, device, bs=32):
    res = []
    for name in names:
        for size,shape in sizes.items() if name!='crd' else {'128, k=16384':(1,1,1)}.items():
            l,p,s,t,kw = case(name, *shape, bs, device)
            vals = []
            for f in (l,p):
                torch.manual_seed(1)
                vals.append(both(f, s, t, **kw)[0])
            # negatives are drawn, and not by one rule
            if name!='crd': torch.testing.assert_close(*vals, rtol=2e-3, atol=1e-5, msg=lambda m: f'{name}: {m}')
            res.append(row('plain', name, size, race([partial(both, f, s, t, **kw) for f in (l,p)], device, rounds)))
    return res

# ---------------------------------------------------------------- torchdistill
def io(**kw): return {k:dict(output=v, input=v) for k,v in kw.items()}
def one(s, t): return io(s=s),io(t=t)

def peers(td):
    "By name: keywords that make ours the same, torchdistill's loss, how it wants the features"
    def at(k): return dict(io='output', path=k)
    pair,code = dict(p=dict(student=at('s'), teacher=at('t'), weight=1.)),dict(mode='torchdistill')
    flow = dict(p={f'{w}_{o}':at(o) for w in ('student','teacher') for o in ('first','second')})
    flow['p']['weight'] = 1.
    four = [f'{w}_{o}_module_{p}' for w in ('student','teacher') for o in ('logit','feature') for p in ('path','io')]
    four = {k:('output' if k.endswith('io') else k.split('_')[1]) for k in four}
    def factors(s, t): return io(translator=s, feature_adapter=s),io(paraphraser=t)
    def twice(f): return lambda s,t: (f(s),f(t))
    return dict(
        at=(code, td.ATLoss(pair), one), ab=({}, td.AltActTransferLoss(pair, 1., 'mean'), one), ickd=(code, td.ChSimLoss(pair), one),
        fsp=(code, td.FSPLoss(flow), twice(lambda o: io(first=o[0], second=o[1]))), ft=(code, td.FTLoss(), factors), kta=(code, td.KTALoss(), factors),
        vid=({}, td.VIDLoss(pair), one), pad=({}, td.PADL2Loss('s','t'), lambda s,t: (io(s=s[0].flatten(1), var_estimator=s[1].flatten(1)),io(t=t.flatten(1)))),
        reviewkd=({}, td.HierarchicalContextLoss('s','output','t','output'), lambda s,t: (io(s=(s,None)),io(t=t))),
        norm=(code, td.RegularizationLoss('s'), one),
        dist_plus=(code, td.DISTPlusLoss(**four), twice(lambda o: io(feature=o[0], logit=o[1]))), affinity=(code, td.AffinityLoss('s','t'), one),
        rkd=({}, td.RKDLoss('s','t',1.,2.,'mean'), one), sp=(code, td.SPKDLoss('s','t','batchmean'), one),
        pkt=(code, td.PKTLoss('s','output','t','output'), lambda s,t: one(s.flatten(1), t.flatten(1))),
        skd_direction=({}, td.SKDDirectionLoss('s','output','t','output',.1,'paper'), one))

def against_peer(names, rounds, device, bs=32):
    try: from torchdistill.losses import mid_level as td
    except ImportError: raise SystemExit(
        "torchdistill is not installed, so there is nothing to compare with: `pip install torchdistill==1.1.5`, or leave `--peer` out")
    res,ps,who = [],peers(td),('ours','torchdistill')
    for name in names:
        # its loop over channels takes 20 GB at 64x32x32
        for size,shape in (({'10x33x33':(10,33,33)} if name=='affinity' else sizes) if name in ps else {}).items():
            (kw,l,to_io),(_,_,s,t,_) = ps[name],case(name, *shape, bs, device)
            forms = [get_loss(name, **kw),lambda s,t: l(*to_io(s,t))]
            torch.testing.assert_close(*[both(f, s, t)[0].flatten() for f in forms], rtol=2e-3, atol=1e-5, msg=lambda m: f'{name}: {m}')
            res.append(row('peer', name, size, race([partial(both, f, s, t) for f in forms], device, rounds), who))
    if 'crd' in names:
        res.append(row('peer', 'crd: new bank', '200k items', race([lambda: CRDLoss(n_items),
            lambda: td.CRDLoss('s','e','t',128,n_items,16384,n_items)], device, rounds), who))
        l,_,s,t,kw = case('crd', 1, 1, 1, bs, device)
        o = td.CRDLoss('s','e','t',128,n_classes,l.k,n_classes).to(device)
        o.memory_v1,o.memory_v2,o.num_samples,neg = l.bank_s.clone(),l.bank_t.clone(),n_items,l.negatives(kw['index'], kw['targ'])
        idx = torch.cat([kw['index'][:,None],neg], 1)
        def theirs(s):
            # it keeps the graph of the first batch otherwise
            o.params = torch.tensor([l.k,.07,-1,-1,.5], device=device)
            return o({**io(s=F.normalize(s)), 'e':dict(input=dict(pos_idx=kw['index'], contrast_idx=idx))}, io(t=F.normalize(t)))
        res.append(row('peer', 'crd: a batch', '200k, k=16384', race([lambda: both(l, s, t, **kw, neg=neg), lambda: both(theirs, s)], device, rounds), who))
    return res

# ---------------------------------------------------------------- a step with two attention terms
def small(size): return digits_dls(size=size), tiny_cnn((4,8,16)), tiny_cnn((32,64,128)), ('1','2')
def resnets(): return random_dls(), resnet18(num_classes=10), resnet34(num_classes=10), ('layer3','layer4')
at_works = dict(digits=partial(small, 8), size32=partial(small, 32), resnet=resnets)

def hooked(model, layers):
    "Where the outputs of `layers` are kept"
    kept = {}
    def _hook(k): return lambda m,i,o: kept.__setitem__(k, o)
    for k in layers: model.get_submodule(k).register_forward_hook(_hook(k))
    return kept

class PlainAT(Callback):
    "Two attention terms as one would write them into a callback"
    def __init__(self, teacher, layers, weight): self.teacher,self.layers,self.weight = teacher,layers,weight
    def before_fit(self): self.kept,self.seen = hooked(self.model, self.layers),hooked(self.teacher, self.layers)
    def after_loss(self):
        with torch.no_grad(): self.teacher(self.x.as_subclass(Tensor))
        more = sum(self.weight*at(self.kept[k], self.seen[k]) for k in self.layers)
        self.learn.loss_grad = self.learn.loss_grad.as_subclass(Tensor)+more
        self.learn.loss = self.learn.loss_grad.clone()

def step_forms(make, device, weight=1.):
    "Learners, and the three forms of a step"
    set_seed(0)
    dls,student,teacher,layers = make()
    dls.to(device)
    batches = [b for b in (to_device(b, device) for b in dls.train) if find_bs(b)==dls.train.bs]
    def new(): return deepcopy(teacher).to(device).eval().requires_grad_(False)
    terms = [Term(ATLoss(), k, k, weight=weight) for k in layers]
    cbs = KnowledgeDistillation(new(), alpha=0, terms=terms),PlainAT(new(), layers, weight)
    learns,model,frozen = [Learner(dls, deepcopy(student), CrossEntropyLossFlat(), cbs=cb) for cb in cbs],student.to(device).train(),new()
    kept,seen,opt,turn = hooked(model, layers),hooked(frozen, layers),torch.optim.AdamW(model.parameters(), 1e-4),[0,0,0]
    def bare(i, b):
        x,y = [o.as_subclass(Tensor) for o in b]
        loss = F.cross_entropy(model(x), y)
        with torch.no_grad(): frozen(x)
        (loss+sum(weight*at(kept[k], seen[k]) for k in layers)).backward()
        opt.step()
        opt.zero_grad(set_to_none=False)
    def _next(j, f):
        i = turn[j] = turn[j]+1
        f(i, batches[i%len(batches)])
    return learns,[partial(_next, j, f) for j,f in enumerate((learns[0].one_batch, learns[1].one_batch, bare))]

def steps_at(works, rounds, device):
    res = []
    for name in works:
        learns,forms = step_forms(at_works[name], device)
        def _run():
            t = race(forms, device, max(rounds, 40), secs=60., min_ms=1.)
            for j,who in ((1,'fastai'),(2,'bare')): res.append(row('at', name, 'step', t[:,[0,j]], ('fastkd',who)))
        with warnings.catch_warnings():
            # untrained teachers are near chance
            warnings.filterwarnings('ignore', message='the teacher is right on')
            inside_fits(learns, 100, _run)
    return res

@call_parse
def main(
    names:str='', # Losses, with commas; all if empty
    peer:bool=False, # Against torchdistill instead of the plain forms?
    at:bool=False, # A training step with two attention terms instead?
    works:str='digits,size32,resnet', # With `at`: which nets
    rounds:int=15, # Samples of each form; fewer of slow ones
    out:str=str(Path(__file__).parent/'losses.csv'), # Rows of the same part, loss and size are replaced
    device:str='cpu' # Or 'cuda'
):
    "Time the losses between layers against plain forms of the same formulas"
    torch.set_num_threads(1)
    keep_heap()
    nms,dev,out = names.split(',') if names else all_names(),torch.device(device),Path(out)
    gc.collect()
    gc.freeze()
    gc.disable()
    try: rows = steps_at(works.split(','), rounds, dev) if at else (against_peer if peer else against_plain)(nms, rounds, dev)
    finally:
        gc.enable()
        gc.unfreeze()
    rows = [dict(device=torch.cuda.get_device_name() if dev.type=='cuda' else 'cpu', **o) for o in rows]
    key = itemgetter('device','part','loss','size','against')
    old = list(csv.DictReader(out.open())) if out.exists() else []
    rows = {**{key(o):o for o in old}, **{key(o):o for o in rows}}.values()
    with out.open('w', newline='') as f:
        w = csv.DictWriter(f, list(first(rows)))
        w.writeheader()
        w.writerows(rows)
