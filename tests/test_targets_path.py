"One path: whether the teacher answers live, from a store, from the batch or from a cache, a student learns the same"
from fastai.vision.all import *
from fastkd.all import *
from fastkd.losses.sparse import *
from fastkd.targets.all import *
from fastkd.targets.kinds import decode,encode
from fastkd.test_utils import *
import copy,inspect,json,os,subprocess,sys,warnings
import numpy as np,pytest
from conftest import ended,start

# fastai brings fastcore's test helpers, which pytest would take for tests
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]
pytestmark = pytest.mark.filterwarnings('ignore:Using a non-tuple', 'ignore:.*deprecated', 'ignore:the teacher is right', 'ignore:the stored answers were right')
KD = KnowledgeDistillation

# -- small data of every task
def _rand(i, *shape, add=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(1000*add+int(i)))
def _ints(i, c, *shape): return torch.randint(c, shape, generator=torch.Generator().manual_seed(5000+int(i)))
def x_vec(i): return _rand(i, 6)
def y_class(i): return _ints(i, 5, 1)[0]
def x_img(i): return _rand(i, 3, 4, 4)
def y_mask(i): return torch.where(_rand(i, 4, 4, add=1)>1, 255, _ints(i, 5, 4, 4))
def y_multi(i): return (_rand(i, 5, add=1)>0).float()
def y_value(i): return _rand(i, 5, add=1)
def x_text(i): return _rand(i, 4, 6)
def y_text(i): return _ints(i, 5, 4)

class Heads(nn.Module):
    def __init__(self): super().__init__(); self.a,self.b = nn.Linear(6,5),nn.Linear(6,3)
    def forward(self, x): return {'a':self.a(x), 'b':self.b(x)}
def ce_a(p, y): return F.cross_entropy(p['a'], y)

tasks = dict(
    softmax=(x_vec, y_class, lambda: nn.Linear(6,5), CrossEntropyLossFlat()),
    pixels=(x_img, y_mask, lambda: nn.Conv2d(3,5,1), CrossEntropyLossFlat(axis=1, ignore_index=255)),
    text=(x_text, y_text, lambda: nn.Linear(6,5), CrossEntropyLossFlat()),
    binary=(x_vec, y_multi, lambda: nn.Linear(6,5), BCEWithLogitsLossFlat()),
    regress=(x_vec, y_value, lambda: nn.Linear(6,5), MSELossFlat()),
    heads=(x_vec, y_class, Heads, ce_a))

def net(make, seed, scale=1.):
    with no_random(seed, reproducible=False): m = make()
    for p in m.parameters(): p.data.mul_(scale)
    return m

class Count(nn.Module):
    "A teacher that counts its items"
    def __init__(self, m): super().__init__(); self.m,self.n,self.seen = m,0,[]
    def forward(self, x):
        self.n += len(x)
        self.seen.append(x.detach().clone())
        return self.m(x)

def data(task, n=40, bs=16, **kw):
    fx,fy,make,lf = tasks[task]
    ds = Datasets(list(range(n)), [[fx],[fy]], splits=(list(range(n-8)),list(range(n-8, n))))
    dls = ds.dataloaders(bs=bs, val_bs=8, num_workers=0, drop_last=False, **kw)
    return dls,net(make, 1, 3.),net(make, 2),lf

def reseed(dls):
    set_seed(4)
    dls.train.rng = random.Random(0)
def quiet(learn, n=1, lr=0., **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kw)
    return learn

class Steps(Callback):
    "Loss, gradient, input, prediction and labels of each step"
    order = 100
    def before_fit(self): self.all = []
    def after_backward(self): self.all.append((self.learn.loss_grad.detach().clone(), [p.grad.clone() for p in self.learn.model.parameters()], self.xb[0].detach().clone(), to_detach(self.pred), self.yb))

def steps(dls, student, lf, cbs=(), n=1):
    reseed(dls)
    s = Steps()
    quiet(Learner(dls, copy.deepcopy(student), lf, opt_func=SGD, metrics=[]), n, cbs=[*L(cbs), s])
    return s.all

def same(a, b, tol=1e-6):
    assert len(a)==len(b)>0
    for p,q in zip(a, b):
        torch.testing.assert_close(p[2], q[2], rtol=0, atol=0)
        for u,v in zip([p[0],*p[1]], [q[0],*q[1]]): torch.testing.assert_close(u.as_subclass(Tensor), v.as_subclass(Tensor), rtol=tol, atol=tol)

names = [o for o in list_losses() if [*inspect.signature(type(get_loss(o)).func).parameters][0]=='inp']
def has(nm, k): return k in type(get_loss(nm)).hypers
def loss_of(nm): return get_loss(nm, **({'T':2.} if has(nm, 'T') else {}))
few_cases = [('softmax','kd'),('softmax','dkd'),('softmax','nkd'),('softmax','mlkd'),('pixels','kd'),('pixels','dist'),('text','ofa'),('binary','bkd'),('regress','mse_logits'),('heads','dict')]
cases = [('softmax',o) for o in names]+[(t,o) for t in ('pixels','text') for o in names if has(o, 'axis')]+[('binary','bkd'),('binary','mse_logits'),('regress','mse_logits'),('heads','dict')]

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Data, nets and stores, made once"
    made,d = {},tmp_path_factory.mktemp('stores')
    def _get(task, **kw):
        k = (task,'store',*kw.items())
        if task not in made: made[task] = data(task)
        dls,t,s,lf = made[task]
        if k not in made:
            teacher = Teacher(t, output=noop) if task=='heads' else t
            made[k] = precompute_targets(teacher, dls, d/'_'.join(map(str, [task,*kw.values()])), task='softmax' if task=='heads' else {'pixels':'softmax','text':'softmax'}.get(task, task), axis=-1 if task=='text' else None, bar=noop, **kw)
        return *made[task],made[k]
    return _get

def the_loss(task, nm):
    if task!='heads': return loss_of(nm)
    return DictLoss({'a':KDLoss(T=2.), 'b':(HardKDLoss(),.5)})

@pytest.mark.parametrize('task,nm', cases)
def test_one_path(world, task, nm):
    "Live, stored, carried by the batch, in a plain loss function"
    dls,t,s,lf,store = world(task, dtype='float32')
    if task=='text': assert store.spec['axis']==1 and store.spec['shape']==[4,5]
    loss = the_loss(task, nm)
    live = steps(dls, s, lf, KD(t, loss, alpha=.3))
    same(live, steps(dls, s, lf, KD(store, loss, alpha=.3)))
    carried = store.attach(dls)
    same(live, steps(carried, s, lf, KD(loss=loss, alpha=.3)))
    same(live, steps(carried, s, DistillationLoss(lf, loss, alpha=.3)))

@pytest.mark.parametrize('kind', ['dense','dense8'])
@pytest.mark.parametrize('task,nm', few_cases)
def test_rounded(world, task, nm, kind):
    "What is left is the rounding of the answers, which has a bound: the loss is that of the answers as they are stored"
    if kind=='dense8' and task=='regress': pytest.skip('values are stored in float32')
    dls,t,s,lf,store = world(task, kind=kind)
    loss = the_loss(task, nm)
    own = infer_loss(lf, loss) if task!='heads' else loss
    for l,_,x,pred,yb in steps(dls, s, lf, KD(store, loss, alpha=.3)):
        with torch.no_grad(): z = t(x)
        got = rounded(z, store)
        bounded(z, got, store.spec)
        want = .7*lf(pred, *yb)+.3*call_loss(own, pred, got, yb[0])
        torch.testing.assert_close(l.as_subclass(Tensor), want.as_subclass(Tensor), rtol=1e-6, atol=1e-6)

def rounded(z, store): return decode(encode(store.spec['kind'], z, store.spec), store.spec)
def bounded(z, got, spec):
    if isinstance(z, dict): return [bounded(z[k], got[k], {**spec, 'shape':spec['shape'][k]}) for k in z]
    d = (got-z).abs()
    if spec['task']=='regress': return torch.testing.assert_close(got, z, rtol=0, atol=0)
    ax = spec['axis']%len(spec['shape'])+1
    if spec['kind']=='dense8': lim = (z.amax(ax, True)-z.amin(ax, True))/255*.5
    else: lim = (z if spec['task']=='binary' else z-z.mean(ax, keepdim=True)).abs()*2**-11
    # and one float32 addition
    assert (d<=lim+1e-6*z.abs().max()).all()

@pytest.mark.parametrize('task,nm', few_cases)
def test_cached(world, task, nm, tmp_path):
    "The first epoch and the next from the cache are those of a store"
    dls,t,s,lf,store = world(task)
    loss = the_loss(task, nm)
    want = steps(dls, s, lf, KD(store, loss, alpha=.3), 2)
    same(want, steps(dls, s, lf, KD(t, loss, alpha=.3, cache=tmp_path/'c'), 2))

sparse = dict(kind='sparse', T=2., k=4)
@pytest.mark.parametrize('task', ['softmax','pixels','text'])
@pytest.mark.parametrize('tail', ['sample','bucket'])
def test_sparse(world, task, tail):
    "Rows of four of five classes: the same on all routes, `hard` exactly that of the live teacher"
    dls,t,s,lf,store = world(task, **sparse, tail=tail)
    carried = store.attach(dls)
    for loss in (KDLoss(T=2.),HardKDLoss()):
        a = steps(dls, s, lf, KD(store, loss, alpha=.3))
        same(a, steps(carried, s, lf, KD(loss=loss, alpha=.3)))
        same(a, steps(carried, s, DistillationLoss(lf, loss, alpha=.3)))
        if isinstance(loss, HardKDLoss): same(a, steps(dls, s, lf, KD(t, loss, alpha=.3)))

@pytest.mark.parametrize('task', ['softmax','pixels','text'])
def test_sparse_is_unbiased(world, task):
    "The mean of the gradient over many stores is that of all logits, within four standard errors"
    dls,t,s,lf,store = world(task, **sparse)
    own,(x,y) = infer_loss(lf, KDLoss(T=2.)),dls.valid.one_batch()
    z,pred = t(x).detach(),s(x).detach().requires_grad_()
    call_loss(own, pred, z, y).backward()
    want,gs,seeds = pred.grad.clone(),[],np.random.default_rng(0).integers(0, 2**63, (400,len(x)), dtype=np.uint64)
    for sd in seeds:
        pred.grad = None
        call_loss(own, pred, decode(encode('sparse', z, store.spec, sd), store.spec), y).backward()
        gs.append(pred.grad.clone())
    gs = torch.stack(gs)
    # log-probabilities of the head are rounded to float16
    assert ((gs.mean(0)-want).abs()<=4.5*gs.std(0)/len(gs)**.5+2e-3*want.abs().max()).all()

@pytest.mark.parametrize('nm', [o for o in names if o not in ('kd','hard')])
def test_sparse_is_not_enough(world, nm):
    dls,t,s,lf,store = world('softmax', **sparse)
    learn = Learner(dls, copy.deepcopy(s), lf, metrics=[])
    for d,cb in ((dls,KD(store, nm)),(store.attach(dls),KD(loss=nm))):
        with pytest.raises(ValueError, match='all of the teacher.*4 of 5 classes.*dense'): quiet(Learner(d, learn.model, lf, metrics=[]), cbs=cb)
    assert all(torch.equal(p, q) for p,q in zip(learn.model.parameters(), s.parameters()))

def test_sparse_has_one_temperature(world):
    dls,t,s,lf,store = world('softmax', **sparse)
    for T in (4.,SchedLin(2., 4.)):
        with pytest.raises(ValueError, match='stored for T=2'): steps(dls, s, lf, [KD(store, T=T), Never()])

class Never(Callback):
    order = 200
    def after_backward(self): raise AssertionError('a step was taken')

# -- precompute_targets
@pytest.fixture
def toy(): return data('softmax')

def answers(store, dls, items=range(40)): return torch.stack([store[i] for i in items])
def pre(t, dls, path, **kw): return precompute_targets(t, dls, path, **{'bar':noop, 'task':'softmax', 'dtype':'float32', **kw})
def xs(items): return torch.stack([x_vec(i) for i in items])
def close(a, b, tol=1e-6): torch.testing.assert_close(a, b.detach(), rtol=tol, atol=tol)

def test_who_can_answer(toy, tmp_path):
    "Learner, Teacher, module, ensemble, export: item by item what the model says, training and validation items"
    dls,t,s,lf = toy
    other = net(lambda: nn.Linear(6,5), 7)
    want = t(xs(range(40)))
    learn = Learner(dls, t, lf, path=tmp_path)
    learn.export('t.pkl')
    mean = torch.logaddexp(t(xs(range(40))).log_softmax(1), other(xs(range(40))).log_softmax(1))-math.log(2)
    for i,(o,z) in enumerate([(learn,want),(Teacher(t),want),(t,want),([t,other],mean),(tmp_path/'t.pkl',want)]):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            store = pre(o, dls, tmp_path/str(i))
        assert len(store)==40
        close(answers(store, dls), z)
        preds = torch.cat([t(x) for x,_ in dls.valid])
        if i<3: close(answers(store, dls, range(32, 40)), preds)

def test_whose_items(toy, tmp_path):
    "DataLoaders, one DataLoader, a test_dl, a list: each adds what is missing to one store"
    dls,t,s,lf = toy
    learn,c = Learner(dls, Count(t), lf),None
    c = learn.model
    def asked(items, n):
        c.n,c.seen = 0,[]
        store = pre(learn, items, tmp_path/'s')
        assert c.n==n and len({x.numpy().tobytes() for b in c.seen for x in b})==n
        return store
    # the first batch is asked for its shape, once
    assert len(pre(learn, dls.valid, tmp_path/'s'))==8
    asked(dls.test_dl(list(range(20, 36))), 12)
    asked([3,4,5,40,41], 5)
    asked(dls, 17)
    store = asked(dls, 0)
    close(answers(store, dls, range(42)), t(xs(range(42))))
    with pytest.raises(TypeError, match='list of items'): pre(t, [1,2,3], tmp_path/'s')

def test_same_item_twice(tmp_path):
    "An item among the training and the validation items, and twice in a list, is asked about once"
    _,t,_,lf = data('softmax')
    ds = Datasets([0,1,2,3,2,5,1,7], [[x_vec],[y_class]], splits=([0,1,2,3,4,5],[4,5,6,7]))
    dls,c = ds.dataloaders(bs=3, val_bs=2, num_workers=0),Count(t)
    store = pre(c, dls, tmp_path/'s')
    assert len(store)==6 and c.n==6+3
    close(answers(store, dls, [0,1,2,3,5,7]), t(xs([0,1,2,3,5,7])))

class Stumble(Count):
    def __init__(self, m, at): super().__init__(m); self.at,self.calls = at,0
    def forward(self, x):
        self.calls += 1
        if self.calls==self.at: raise KeyboardInterrupt
        return super().forward(x)

@pytest.mark.parametrize('at', [2,4])
def test_resumes(toy, tmp_path, at):
    dls,t,s,lf = toy
    c = Stumble(t, at).train()
    with pytest.raises(KeyboardInterrupt): pre(c, dls, tmp_path/'s')
    assert all(m.training for m in c.modules())
    done = TargetStore(tmp_path/'s')
    assert len(done)==(at-2)*16
    c.n = 0
    store = pre(c, dls, tmp_path/'s')
    assert c.n==40-len(done) and len(store)==40
    close(answers(store, dls), t(xs(range(40))))

def test_bar_and_states(toy, tmp_path, capsys):
    "fastai's progress bar with items per second; random numbers, order and models are as if nothing had happened"
    dls,t,s,lf = toy
    from fastprogress.fastprogress import progress_bar
    made = []
    def bar(o):
        made.append(progress_bar(o))
        return made[0]
    reseed(dls)
    was = random.getstate(),torch.get_rng_state(),np.random.get_state()[1],dls.train.rng.getstate()
    pre(t.train(), dls, tmp_path/'s', bar=bar)
    now = random.getstate(),torch.get_rng_state(),np.random.get_state()[1],dls.train.rng.getstate()
    assert was[0]==now[0] and torch.equal(was[1], now[1]) and (was[2]==now[2]).all() and was[3]==now[3]
    assert made[0].total==3 and re.fullmatch(r'[\d,]+ items/s', made[0].comment) and t.training
    assert '100.00% [3/3' in capsys.readouterr().out

def test_amp(toy, tmp_path):
    dls,t,s,lf = toy
    tt = Teacher(t)
    store = pre(tt, dls, tmp_path/'s', amp=torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16), torch.no_grad(): want = t(xs(range(16)))
    assert tt.dtype is None and want.dtype==torch.bfloat16
    close(answers(store, dls, range(16)), want.float())
    with pytest.raises(ValueError, match="teacher 'hash'"): pre(tt, dls, tmp_path/'s')

def test_more_batch_sizes(toy, tmp_path):
    "More items a batch than there are; a last batch that training drops"
    _,t,_,_ = toy
    for i,kw in enumerate([dict(bs=64), dict(bs=7)]):
        dls = Datasets(list(range(10)), [[x_vec],[y_class]], splits=(list(range(8)),[8,9])).dataloaders(num_workers=0, drop_last=True, **kw)
        close(answers(pre(t, dls, tmp_path/f'{i}'), dls, range(10)), t(xs(range(10))))
        close(answers(pre(t, dls, tmp_path/f'b{i}', bs=3), dls, range(10)), t(xs(range(10))))

@pytest.mark.parametrize('change,says', [
    ('teacher', "teacher 'hash'"), ('layers', "teacher 'hash'"), ('vocab', 'vocab: stored'), ('tfms', 'transforms: stored'), ('T', "spec 'T': stored 2.0, now 4.0"),
    ('kind', "spec 'kind'"), ('k', "spec 'k'"), ('task', "spec 'task'"), ('seed', 'seed: stored 0, now 1')])
def test_another_store(toy, tmp_path, change, says):
    dls,t,s,lf = toy
    model = nn.Sequential(t, nn.Identity())
    kw = dict(kind='sparse', T=2., k=4) if change in ('T','k') else {}
    vocab = lambda d,v: (setattr(d, 'vocab', v), d)[1]
    pre(Teacher(model, vocab=None), vocab(dls, list('abcde')), tmp_path/'s', **kw)
    if change=='teacher': model = nn.Sequential(s, nn.Identity())
    if change=='layers': model = nn.Sequential(t, nn.Dropout())
    if change=='vocab': vocab(dls, list('abced'))
    if change=='tfms': dls = vocab(Datasets(list(range(40)), [[x_vec, lambda x: x+1],[y_class]]).dataloaders(bs=16, num_workers=0), list('abcde'))
    now = {'T':dict(T=4.), 'k':dict(k=3), 'kind':dict(kind='dense8'), 'task':dict(task='binary'), 'seed':dict(seed=1)}.get(change, {})
    with pytest.raises(ValueError, match='made otherwise') as e: pre(model, dls, tmp_path/'s', **{**kw, **now})
    assert says in str(e.value)

def test_bad_answers(toy, tmp_path):
    dls,t,s,lf = toy
    class Odd(nn.Module):
        def __init__(self, f): super().__init__(); self.m,self.f = t,f
        def forward(self, x): return self.f(x, self.m(x))
    hit = lambda i: lambda x,z: torch.where((x==x_vec(i)).all(1, keepdim=True), torch.nan, z)
    for i in (3,20):
        with pytest.raises(ValueError, match=f'(?s)NaN or inf in 1 of 16 rows.*Items: {i}$'): pre(Odd(hit(i)), dls, tmp_path/f'n{i}')
    with pytest.raises(ValueError, match='Items: 16, 17, 18, [.]{3}'): pre(Odd(lambda x,z: z*1e5 if (x[0]==x_vec(16)).all() else z), dls, tmp_path/'big', dtype='float16')
    with pytest.raises(ValueError, match='probabilities'): pre(Odd(lambda x,z: z.softmax(1)), dls, tmp_path/'p')
    with pytest.raises(ValueError, match='logits are needed'): pre(Odd(lambda x,z: z.sigmoid()), dls, tmp_path/'p', task='binary')
    assert not (tmp_path/'p').exists()
    with pytest.raises(ValueError, match="pass `task='softmax'`"): pre(t, dls, tmp_path/'t', task=None)
    with pytest.raises(ValueError, match="`task` must be"): pre(t, dls, tmp_path/'t', task='classes')
    for kw in (dict(views=0), dict(views=True), dict(tta=-1), dict(tta=1.), dict(tta=2, views=2), dict(tta=2)):
        with pytest.raises(ValueError): pre(t, dls, tmp_path/'t', **kw)
    assert not (tmp_path/'t').exists()

def share(rank, path):
    os.environ.update(RANK=str(rank), WORLD_SIZE='2')
    dls,t,s,lf = data('softmax')
    pre(t, dls, path)

@pytest.mark.parametrize('late', [False,True])
def test_two_ranks(toy, tmp_path, late):
    "Each process its share, read as one store; one that comes late takes no more"
    dls,t,s,lf = toy
    ps = []
    for r in range(2):
        ps.append(start(share, r, tmp_path/'s'))
        if late: ended(ps[-1])
    for p in ps: assert ended(p).exitcode==0
    store = TargetStore(tmp_path/'s')
    assert len(store)==40 and sorted(len(o.keys) for o in store.parts)==[20,20]
    close(answers(store, dls), t(xs(range(40))))

# -- augmented versions
class Jitter(RandTransform):
    def before_call(self, b, split_idx): super().before_call(b, split_idx); self.by = random.random()
    def encodes(self, x:TensorImage): return x+self.by
class Own(RandTransform):
    rng = random.Random(3)
    def encodes(self, x:TensorImage): return x+self.rng.random()
def x_pic(i): return TensorImage(_rand(i, 1, 8, 8))
def pics(n=24, bs=8, item=True, batch=True, num_workers=0, **kw):
    db = DataBlock((TransformBlock,TransformBlock), get_x=x_pic, get_y=y_class, splitter=lambda o: (list(range(n-4)),list(range(n-4, n))),
        item_tfms=[Jitter(p=.8)] if item is True else item, batch_tfms=aug_transforms(max_lighting=.3) if batch is True else batch)
    return db.dataloaders(list(range(n)), bs=bs, num_workers=num_workers, drop_last=False, **kw)
def pic_net(): return nn.Sequential(nn.Flatten(), nn.Linear(64,5))
class See(Callback):
    "Items and inputs of each training batch"
    order = 100
    def before_fit(self): self.all = []
    def before_batch(self):
        if self.training: self.all.append((self.epoch, self.learn.dl.items_now.tolist(), self.x.clone()))

@pytest.mark.parametrize('workers', [0,2])
def test_views(tmp_path, workers):
    "The student sees, bit for bit, what the teacher saw, whatever the order, the batches and the processes; epoch e is view e mod k"
    dls,c = pics(),Count(net(pic_net, 1))
    store = pre(c, dls, tmp_path/'s', views=2)
    assert store.replay and store.views==2 and len(store)==20
    seen = {x.numpy().tobytes() for b in c.seen[1:] for x in b}
    assert len(seen)==40
    other,see = pics(bs=5, num_workers=workers),See()
    learn = Learner(other, net(pic_net, 2), CrossEntropyLossFlat(), opt_func=SGD)
    quiet(learn, 3, cbs=[KD(store, T=2.), see])
    by = {}
    for e,idx,x in see.all:
        for i,o in zip(idx, x): by[e,i] = o
    assert {o.numpy().tobytes() for (e,_),o in by.items() if e<2}==seen and len(by)==60
    for i in range(20): assert torch.equal(by[0,i], by[2,i]) and not torch.equal(by[0,i], by[1,i])

def test_views_train_as_live(tmp_path):
    "Loss and gradient from the store are those of a live teacher that is given the same inputs"
    dls,t,s = pics(),net(pic_net, 1, 3.),net(pic_net, 2)
    store = pre(t, dls, tmp_path/'s', views=2)
    got = steps(dls, s, CrossEntropyLossFlat(), KD(store, T=2., alpha=.3), 3)
    for l,g,x,pred,yb in got:
        with torch.no_grad(): want = .7*F.cross_entropy(pred, yb[0])+.3*kd_loss(pred, t(x.as_subclass(Tensor)), T=2.)
        close(l.as_subclass(Tensor), want.as_subclass(Tensor), 1e-5)

def test_random_is_refused(tmp_path):
    t = net(pic_net, 1)
    with pytest.raises(ValueError, match=r'random transforms \(Jitter, .*`views=4`.*stale_ok'): pre(t, pics(), tmp_path/'s')
    with pytest.raises(ValueError, match='Own.*cannot be repeated'): pre(t, pics(item=[Own()], batch=None), tmp_path/'s', views=2)
    with pytest.raises(ValueError, match='RandomErasing.*once per batch'): pre(t, pics(item=None, batch=[RandomErasing(p=1., max_count=2)]), tmp_path/'s', views=2)
    assert not (tmp_path/'s').exists()

def test_stale(tmp_path):
    "Answers to the items without their transforms, asked for by name"
    dls,t = pics(),net(pic_net, 1)
    store = pre(t, dls, tmp_path/'s', stale_ok=True)
    close(answers(store, dls, range(24)), t(torch.stack([x_pic(i).as_subclass(Tensor) for i in range(24)])))
    assert store.manifest['stale'] and dls.train_ds.split_idx==0
    with pytest.warns(UserWarning, match='stale_ok=True'): steps(dls, net(pic_net, 2), CrossEntropyLossFlat(), KD(store, T=2.))

def test_tta(tmp_path):
    "The mean of probabilities over the item as it is and three augmented versions of it"
    dls,c = pics(),Count(net(pic_net, 1, 3.))
    store = pre(c, dls, tmp_path/'s', tta=3)
    clean = torch.stack([x_pic(i).as_subclass(Tensor) for i in range(20)])
    ds = {x.numpy().tobytes():x for b in c.seen[1:] for x in b}
    logp = torch.zeros(20, 5)
    for v in range(3):
        dl = track(dls.train.new(shuffle=False, drop_last=False), root=dls.path, view=v, seed=0)
        x = torch.cat([b[0] for b in dl]).as_subclass(Tensor)
        assert all(o.numpy().tobytes() in ds for o in x)
        logp += c.m(x).softmax(1).detach()
    close(answers(store, dls, range(20)).softmax(1), (logp+c.m(clean).softmax(1))/4, 1e-5)
    close(answers(store, dls, range(20, 24)), c.m(torch.stack([x_pic(i).as_subclass(Tensor) for i in range(20, 24)])))
    with pytest.raises(ValueError, match="teacher 'tta': stored 3, now null|'hash'"): pre(c, dls, tmp_path/'s', stale_ok=True)

# -- a cache that fills as training goes
def table(learn): return np.array([o for o in learn.recorder.values], float)
def trained(dls, s, lf, cbs, n=2, **kw):
    reseed(dls)
    set_seed(5, reproducible=True)
    return table(quiet(Learner(dls, copy.deepcopy(s), lf, metrics=[], **kw), n, 1e-2, cbs=cbs))

def test_cache_asks_once(toy, tmp_path):
    "Once per item, and never again in the next fit; the losses are those of a live teacher, up to float16"
    dls,t,s,lf = toy
    c = Count(t)
    live = trained(dls, s, lf, KD(t))
    a = trained(dls, s, lf, KD(c, cache=tmp_path/'c'))
    seen = [o.numpy().tobytes() for b in c.seen for o in b]
    # the first answers tell the shape; then the preflight asks about validation items
    assert len(seen)==32+2*8 and len(set(seen))==40
    c.n = 0
    b = trained(dls, s, lf, KD(c, cache=tmp_path/'c'))
    assert c.n==0 and (a==b).all()
    np.testing.assert_allclose(a, live, rtol=2e-3)

def test_cache_of_one_callback(toy, tmp_path):
    "Attached to the Learner, several fits: the order goes on as with a live teacher, and nothing stays locked"
    dls,t,s,lf = toy
    res,idle = [],[]
    for cb in (KD(t),KD(Count(t), cache=tmp_path/'c')):
        reseed(dls)
        set_seed(5, reproducible=True)
        learn = Learner(dls, copy.deepcopy(s), lf, metrics=[], cbs=cb)
        res.append([table(quiet(learn, 1, 1e-2)) for _ in range(3)])
        assert learn.dls is dls and not isinstance(learn.dl, TrackedDL) and type(dls.train) is TfmdDL
        with learn.no_bar(): learn.validate(), learn.get_preds()
    np.testing.assert_allclose(np.concatenate(res[0]), np.concatenate(res[1]), rtol=2e-3)
    assert cb.teacher.teacher.model.n==32+16 and free(tmp_path/'c')

def free(d):
    from fastkd.targets.files import locked
    for o in d.glob('*/lock'):
        with locked(o, wait=False) as ok:
            if not ok: return False
    return True

@pytest.mark.parametrize('what', [ValueError,KeyboardInterrupt])
@pytest.mark.parametrize('attached', [False,True])
def test_cache_goes_on(toy, tmp_path, what, attached):
    dls,t,s,lf = toy
    class Stop(Callback):
        order = 90
        def after_batch(self):
            if self.training and self.iter==1 and self.armed: raise what('enough')
    stop,c = Stop(),Count(t).train()
    stop.armed = True
    kd = KD(c, cache=tmp_path/'c')
    learn = Learner(dls, copy.deepcopy(s), lf, metrics=[], cbs=[kd]*attached)
    with pytest.raises(what, match='enough'): quiet(learn, 1, 1e-2, cbs=[stop]+[kd]*(not attached))
    assert len(TargetStore(tmp_path/'c'))==32
    stop.armed,c.n = False,0
    quiet(learn, 1, 1e-2, cbs=[stop]+[kd]*(not attached))
    assert c.n<=8 and all(m.training for m in c.modules()) and free(tmp_path/'c')
    assert len(TargetStore(tmp_path/'c'))==32

def test_cache_half(toy, tmp_path):
    "What the first fit did not come to is asked for in the second"
    dls,t,s,lf = toy
    c = Count(t)
    class Stop(Callback):
        def after_batch(self):
            if self.training: raise CancelFitException
    quiet(Learner(dls, copy.deepcopy(s), lf, metrics=[], cbs=KD(c, cache=tmp_path/'c')), 1, cbs=Stop())
    assert len(TargetStore(tmp_path/'c'))==16 and free(tmp_path/'c')
    c.n = 0
    a = trained(dls, s, lf, KD(c, cache=tmp_path/'c'))
    # and the preflight asks about validation items
    assert c.n==16+8
    np.testing.assert_allclose(a, trained(dls, s, lf, KD(t)), rtol=2e-3)

def test_cache_fine_tune(tmp_path):
    dls,t = pics(item=None, batch=None),Count(net(pic_net, 1))
    learn = Learner(dls, net(pic_net, 2), CrossEntropyLossFlat(), metrics=[], splitter=lambda m: [list(m[0].parameters()),list(m[1].parameters())])
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(2, cbs=KD(t, cache=tmp_path/'c'))
    assert len(TargetStore(tmp_path/'c'))==20 and t.n==20+2*4 and free(tmp_path/'c')

@pytest.mark.parametrize('mixer', [MixUp,CutMix])
@pytest.mark.parametrize('views', [None,2])
def test_cache_mixed(tmp_path, mixer, views):
    "The teacher sees the items before they are mixed; what it is then worth is what a store gives"
    dls = pics(item=None, batch=None) if views is None else pics()
    t,s = Count(net(pic_net, 1, 3.)),net(pic_net, 2)
    def _run(kd):
        set_seed(3, reproducible=True)
        return steps(dls, s, CrossEntropyLossFlat(), [kd,mixer(.9)], 3)
    a = _run(KD(t, T=2., cache=tmp_path/'c', views=views))
    store = precompute_targets(t.m, dls, tmp_path/'s', task='softmax', views=views, bar=noop)
    cached = TargetStore(tmp_path/'c')
    for v in range(store.views):
        ks = store._index(v)[0][:20] if views else np.intersect1d(store._index(0)[0], cached._index(0)[0])
        assert len(ks)==20
        torch.testing.assert_close(cached.get(cached.rows(ks, v)), store.get(store.rows(ks, v)), rtol=1e-3, atol=1e-3)
    same(a, _run(KD(t, T=2., cache=tmp_path/'c', views=views)), 1e-6)
    same(a, _run(KD(store, T=2.)), 1e-3)

def test_mixed_answer(tmp_path):
    "Probabilities at T are mixed with the weight and the partner of the image"
    dls,t,s = pics(item=None, batch=None),net(pic_net, 1, 3.),net(pic_net, 2)
    store = pre(t, dls, tmp_path/'s')
    class Look(Callback):
        order = 50
        def before_fit(self): self.all = []
        def after_pred(self):
            if self.training: self.all.append((self.learn.mix_up.lam, self.learn.dl.items_now, self.x, self.learn.pred.detach()))
    for mixer in (MixUp(.9),CutMix(.9)):
        if isinstance(mixer, CutMix): Look.after_pred = lambda self: self.all.append((self.learn.cut_mix.lam, self.learn.dl.items_now, self.x.clone(), self.learn.pred.detach())) if self.training else None
        see = Look()
        got = steps(dls, s, CrossEntropyLossFlat(), [KD(store, T=2., alpha=1.), mixer, see])
        for (loss,*_),(lam,idx,x,pred) in zip(got, see.all):
            clean = torch.stack([x_pic(i).as_subclass(Tensor) for i in idx])
            # the partner that gives this picture
            if isinstance(mixer, MixUp): near = lambda i,j: (torch.lerp(clean[j], clean[i], lam[i])-x[i].as_subclass(Tensor)).abs().max()
            else: near = lambda i,j: ((clean[i]!=x[i].as_subclass(Tensor))&(clean[j]!=x[i].as_subclass(Tensor))).float().max()
            p = (t(clean)/2).softmax(1).detach()
            want = 0.
            for i in range(len(idx)):
                j = min(range(len(idx)), key=lambda j: near(i, j).item())
                assert near(i, j)<1e-5
                l = lam[i] if isinstance(mixer, MixUp) else lam
                q = l*p[i]+(1-l)*p[j] if (clean[i]!=x[i].as_subclass(Tensor)).any() else p[i]
                want = want+4*(q*(q.log()-(pred[i]/2).log_softmax(0))).sum()
            close(loss.as_subclass(Tensor), (want/len(idx)).as_subclass(Tensor), 1e-4)

def test_cache_odd_loaders(tmp_path):
    "Dropped stragglers come in the epoch that draws them; a weighted sampler draws some items twice; gradients may be accumulated"
    _,t,s,lf = data('softmax')
    ds = lambda: Datasets(list(range(30)), [[x_vec],[y_class]], splits=(list(range(26)),list(range(26, 30))))
    c,dls = Count(t),ds().dataloaders(bs=8, num_workers=0)
    assert dls.train.drop_last
    trained(dls, s, lf, KD(c, cache=tmp_path/'a'), 1)
    assert len(TargetStore(tmp_path/'a'))==24
    trained(dls, s, lf, [KD(c, cache=tmp_path/'a'),GradientAccumulation(16)], 6)
    assert len(TargetStore(tmp_path/'a'))==26 and c.n<=26+4*4
    c,w = Count(t),ds().weighted_dataloaders([100.]*3+[.1]*23, bs=8, num_workers=0)
    trained(w, s, lf, KD(c, cache=tmp_path/'b'), 2)
    store = TargetStore(tmp_path/'b')
    assert c.n==len(store)+8
    close(torch.stack([store[i] for i in range(3)]), t(xs(range(3))), 2e-3)

def test_cache_windows(toy, tmp_path):
    "Outside of its window the teacher is neither asked nor stored"
    dls,t,s,lf = toy
    c = Count(t)
    trained(dls, s, lf, KD(c, cache=tmp_path/'c', start=1, stop=2), 3)
    assert c.n==32+16
    live,got = (trained(dls, s, lf, KD(c, start=1, stop=2, **kw), 3) for kw in ({},dict(cache=tmp_path/'c')))
    np.testing.assert_allclose(live[:,:2], got[:,:2], rtol=2e-3)

@pytest.mark.parametrize('how', ['cache','dense','sparse'])
def test_without_labels(tmp_path, how):
    _,t,s,lf = data('softmax')
    dls = Datasets(list(range(24)), [[x_vec]], splits=(list(range(16)),list(range(16, 24)))).dataloaders(bs=8, num_workers=0)
    kd = KD(t, 'kd', T=2., alpha=1., cache=tmp_path/'c') if how=='cache' else KD(precompute_targets(t, dls, tmp_path/'s', how, T=2. if how=='sparse' else None, k=4, task='softmax', bar=noop), 'kd', T=2., alpha=1.)
    class OnlyTrain(Callback):
        def before_validate(self): raise CancelValidException
    got = steps(dls, s, lf, [kd,OnlyTrain()])
    for l,_,x,pred,_ in got:
        if how!='sparse': close(l, kd_loss(pred, t(x).detach(), T=2.), 2e-3)

def test_cache_refusals(toy, tmp_path, monkeypatch):
    dls,t,s,lf = toy
    with pytest.raises(ValueError, match='Jitter.*`views=4`.*live'): steps(pics(), net(pic_net, 2), CrossEntropyLossFlat(), KD(net(pic_net, 1), cache=tmp_path/'c'))
    with pytest.raises(ValueError, match='Own'): steps(pics(item=[Own()], batch=None), net(pic_net, 2), CrossEntropyLossFlat(), KD(net(pic_net, 1), cache=tmp_path/'c', views=2))
    with pytest.raises(ValueError, match='`views` must be'): KD(t, cache=tmp_path/'c', views=0)
    with pytest.raises(ValueError, match='goes with `cache`'): KD(t, views=2)
    with pytest.raises(ValueError, match='live teacher'): KD(cache=tmp_path/'c')
    assert not (tmp_path/'c').exists()
    m = copy.deepcopy(t).train()
    steps(dls, s, lf, KD(m, cache=tmp_path/'c'))
    with pytest.raises(ValueError, match="teacher 'hash'"): steps(dls, s, lf, KD(net(lambda: nn.Linear(6,5), 9).train(), cache=tmp_path/'c'))
    assert m.training
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='one process'): steps(dls, s, lf, KD(t, cache=tmp_path/'d'))

def test_cache_of_two_processes(toy, tmp_path):
    "The second is refused while the first one writes"
    dls,t,s,lf = toy
    class Other(Callback):
        order = 90
        def after_batch(self):
            if not self.training or self.iter or self.epoch: return
            with pytest.raises(ValueError, match='being written'): steps(*data('softmax')[::2], lf, KD(t, cache=tmp_path/'c'))
            self.learn.tried = True
    learn = Learner(dls, copy.deepcopy(s), lf, metrics=[])
    quiet(learn, 1, cbs=[KD(t, cache=tmp_path/'c'),Other()])
    assert learn.tried and len(TargetStore(tmp_path/'c'))==32

# -- guards, and all that is not training
def test_changed_pixels(tmp_path):
    "An input that is not the one of before stops training and is named"
    from fastkd.targets.items import item_keys
    d = tmp_path/'im'
    d.mkdir()
    g = np.random.default_rng(0)
    for i in range(48): PILImage.create(g.integers(0, 255, (8,8,3), dtype=np.uint8)).save(d/f'{i%5}_{i:02}.png')
    def make(**kw): return ImageDataLoaders.from_name_func(d, sorted(d.glob('*.png')), lambda o: o[0], bs=16, num_workers=0, **kw)
    dls,t,s = make(),nn.Sequential(nn.Flatten(), nn.Linear(192,5)),nn.Sequential(nn.Flatten(), nn.Linear(192,5))
    store = precompute_targets(t, dls, tmp_path/'s', bar=noop)
    lf = CrossEntropyLossFlat()
    quiet(Learner(dls, s, lf, metrics=[]), cbs=KD(store))
    ks = item_keys(dls.train, d)
    looked = [o for o,k in zip(dls.train.items, ks) if k%16==0]
    assert looked
    PILImage.create(g.integers(0, 255, (8,8,3), dtype=np.uint8)).save(looked[0])
    with pytest.raises(ValueError, match=rf'input of .*{looked[0].name} is not the one'): quiet(Learner(dls, s, lf, metrics=[]), 2, cbs=KD(store))
    with pytest.raises(ValueError, match=rf'input of .*{looked[0].name} is not the one'): quiet(Learner(store.attach(dls), s, lf, metrics=[]), 2, cbs=KD())

def test_other_labels(tmp_path):
    "Labels that changed while the inputs did not: a warning, once a fit; other inputs under the same name: refused"
    def make(fx, fy): return Datasets(list(range(200)), [[fx],[fy]], splits=(list(range(180)),list(range(180, 200)))).dataloaders(bs=16, num_workers=0)
    t = nn.Linear(6,5)
    with no_random(3, reproducible=False): nn.init.normal_(t.weight, std=3.)
    def best(i): return t(x_vec(i)).argmax()
    def wrong(i): return (best(i)+1)%5
    dls,s = make(x_vec, best),nn.Linear(6,5)
    store = pre(t, dls, tmp_path/'s')
    assert store.accuracy()==1
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        quiet(Learner(make(x_vec, wrong), s, CrossEntropyLossFlat(), metrics=[]), 3, cbs=KD(store))
    w = [str(o.message) for o in w if 'labels have changed' in str(o.message)]
    assert len(w)==1 and 'the inputs are the same' in w[0]

def test_other_items(tmp_path):
    "Where inputs cannot be compared, answers that do not fit the labels any more are refused"
    t = net(pic_net, 1, 5.)
    def best(i): return t(x_pic(i)[None].as_subclass(Tensor)).argmax()
    def moved(i): return best((int(i)+1)%150)
    def make(fy): return DataBlock((TransformBlock,TransformBlock), get_x=x_pic, get_y=fy, splitter=lambda o: (list(range(140)),list(range(140, 150))), item_tfms=[Jitter()]).dataloaders(list(range(150)), bs=16, num_workers=0)
    store = pre(t, make(best), tmp_path/'s', stale_ok=True)
    quiet(Learner(make(best), net(pic_net, 2), CrossEntropyLossFlat(), metrics=[]), cbs=KD(store))
    with pytest.raises(ValueError, match='agree with .*100% when they were recorded.*belong to other items'): quiet(Learner(make(moved), net(pic_net, 2), CrossEntropyLossFlat(), metrics=[]), cbs=KD(store))

@pytest.mark.parametrize('nm', ['kd','dkd','wkd'])
def test_labels_in_a_column(tmp_path, nm):
    "Tables have their labels in a column"
    from fastai.tabular.all import TabularPandas,TabularDataLoaders,tabular_learner,CategoryBlock
    g = np.random.default_rng(0)
    df = pd.DataFrame({'a':g.normal(size=40), 'b':g.normal(size=40), 'y':g.integers(0, 5, 40).astype(str)})
    dls = TabularDataLoaders.from_df(df, y_names='y', cont_names=['a','b'], y_block=CategoryBlock(), bs=16, valid_idx=list(range(8)))
    t,s = (tabular_learner(dls, layers=[4], metrics=[]) for _ in range(2))
    store = precompute_targets(t, dls, tmp_path/'s', dtype='float32', bar=noop)
    student,carried = s.model,store.attach(dls)
    same(steps(dls, student, s.loss_func, KD(store, loss_of(nm))), steps(carried, student, DistillationLoss(s.loss_func, loss_of(nm))))

def test_all_but_training(toy, tmp_path):
    "lr_find, validate, get_preds and predictions with a store on board; the DataLoaders stay as they were"
    dls,t,s,lf = toy
    store = pre(t, dls, tmp_path/'s')
    was = {k:v for k,v in dls.train.__dict__.items() if k!='rng'}
    for d,kd in ((dls,KD(store)),(store.attach(dls),KD())):
        learn = Learner(d, copy.deepcopy(s), lf, metrics=[], cbs=kd, path=tmp_path)
        with learn.no_bar(), learn.no_logging():
            learn.lr_find(num_it=4, show_plot=False)
            v = learn.validate()
            p,y = learn.get_preds()
            learn.fit(1, 1e-2)
            learn.get_preds(ds_idx=0)
        assert v[0]==pytest.approx(lf(s(xs(range(32, 40))), y).item(), rel=1e-5) and len(p)==8
        assert learn.dls is d and not isinstance(getattr(learn, 'dl', None), TrackedDL) or d is not dls
    assert {k:v for k,v in dls.train.__dict__.items() if k in was}==was

@pytest.mark.parametrize('route', ['live','store','carried','cache'])
def test_order_goes_on(toy, tmp_path, route):
    "Several fits draw the same orders and random numbers on all routes"
    dls,t,s,lf = toy
    store = pre(t, dls, tmp_path/'s')
    reseed(dls)
    d = store.attach(dls) if route=='carried' else dls
    kd = {'live':KD(t), 'store':KD(store), 'carried':KD(), 'cache':KD(t, cache=tmp_path/'c')}[route]
    set_seed(0)
    orders = []
    class Order(Callback):
        order = 100
        def before_batch(self):
            if self.training: orders.append(self.x.sum(1).cumsum(0).cumsum(0).sum().item())
    learn = Learner(d, copy.deepcopy(s), lf, metrics=[], cbs=Order())
    for _ in range(2): quiet(learn, 2, cbs=kd)
    orders.append(torch.rand(1).item())
    seen = globals().setdefault('_orders', orders)
    assert len(orders)==9 and orders==seen and len(set(orders))==9
