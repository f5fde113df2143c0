"Targets from a store in ordinary fastai life: each answer belongs to its item, and nothing else changes"
from fastai.vision.all import *
from fastai.callback.data import *
from fastkd.all import *
from fastkd.targets.data import *
from fastkd.targets.items import *
from fastkd.test_utils import *
from sklearn.datasets import load_digits,load_breast_cancer
import copy,pickle,shutil,subprocess,textwrap
import numpy as np,pandas as pd,pytest

# fastai brings fastcore's test helpers, which pytest would take for tests
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

pytestmark = pytest.mark.filterwarnings('ignore:Using a non-tuple', 'ignore:.*deprecated', 'ignore:.*is near chance')
KD = KnowledgeDistillation
sz,n_imgs,n_cls = 12,72,4

class Oracle(nn.Module):
    "Says of every picture what no other picture gets"
    def __init__(self, c=n_cls, d=sz*sz, seed=1):
        super().__init__()
        self.register_buffer('w', torch.randn(d, c, generator=torch.Generator().manual_seed(seed)))
    def forward(self, x): return torch.as_tensor(x).as_subclass(Tensor).float().flatten(1)@self.w

def right(t, x, f=Oracle()):
    "Are these the answers to `x`, up to the offset that softmax does not see?"
    t,z = t.as_subclass(Tensor).float(),f(x)
    return torch.allclose(t-t.mean(1, keepdim=True), z-z.mean(1, keepdim=True), atol=1e-3)

@pytest.fixture(scope='module')
def imgs(tmp_path_factory):
    "Digits as PNG files, a folder per class"
    d,res = load_digits(),tmp_path_factory.mktemp('imgs')
    idx = [i for c in range(n_cls) for i in np.flatnonzero(d.target==c)[:n_imgs//n_cls]]
    for i in idx:
        p = res/f'{"abcdefghij"[d.target[i]]}/{i:04}.png'
        p.parent.mkdir(exist_ok=True)
        PILImageBW.create((d.images[i]*15).astype('u1')).resize((sz,sz)).save(p)
    return res

def images(blocks=(), **kwargs):
    kw = dict(get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=0), batch_tfms=Normalize.from_stats([.3],[.3]), n_inp=1)
    return DataBlock(blocks=(ImageBlock(PILImageBW),CategoryBlock,*blocks), **{**kw, **kwargs})
def image_dls(path, *blocks, bs=16, num_workers=0, block=None, **kwargs): return images(blocks, **(block or {})).dataloaders(path, bs=bs, path=path, num_workers=num_workers, **kwargs)

def small(c=n_cls): return nn.Sequential(nn.Conv2d(1,4,3,2,1), nn.ReLU(), nn.Flatten(), nn.Linear(4*sz*sz//4, c))
def precompute(teacher, dls, path, **kw): return precompute_targets(teacher, dls, path, dtype='float32', bar=noop, **kw)
def iter_fit(learn, how='fit', *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): return getattr(learn, how)(*(args or (1,)), **kwargs)

@pytest.fixture(scope='module')
def store(imgs, tmp_path_factory): return precompute(Oracle(), image_dls(imgs), tmp_path_factory.mktemp('store')/'s')

class Check(Callback):
    "Every batch of training: are the answers of the callback those of the items?"
    order = KD.order+1
    def __init__(self, f=None): self.f,self.n = f or Oracle(),0
    def after_loss(self):
        if not self.training or self.learn.knowledge_distillation._idle: return
        kd = self.learn.knowledge_distillation
        t = kd._teacher._dl.answers()
        assert right(t, self.x, self.f), 'misaligned'
        assert isinstance(self.learn.yb, tuple) and len(self.learn.yb)==1
        self.n += len(t)

ways = ['callback','block','attach']
def route(way, store, path, **kwargs):
    "`DataLoaders` and callback"
    if way=='callback': return image_dls(path, **kwargs),KD(store)
    if way=='block': return image_dls(path, TeacherBlock(store), **kwargs),KD()
    return store.attach(image_dls(path, **kwargs)),KD()

def learner(dls, metrics=accuracy, seed=0, **kwargs):
    set_seed(seed)
    return Learner(dls, small(), metrics=metrics, **kwargs)

# ---- the ordinary calls

@pytest.fixture(scope='module', params=ways)
def way(request): return request.param
@pytest.fixture(scope='module')
def trained(way, store, imgs, tmp_path_factory):
    dls,cb = route(way, store, imgs)
    learn = learner(dls, [accuracy,error_rate,F1Score(average='macro'),Perplexity()], path=tmp_path_factory.mktemp('learn'), cbs=[cb,Check()])
    iter_fit(learn, 'fit', 2, 1e-2)
    assert learn.check.n==2*48
    return learn

def plain(learn):
    "The same weights without any distillation"
    res = learner(image_dls(learn.dls.path), [accuracy,error_rate,F1Score(average='macro'),Perplexity()], path=learn.path)
    res.model.load_state_dict(learn.model.state_dict())
    return res

def quiet(learn, f):
    with learn.no_bar(), learn.no_logging(): return f(learn)

def test_fits(way, store, imgs, tmp_path):
    "The callback given to each kind of fit"
    for how,args in (('fit',(1,)),('fit_one_cycle',(1,)),('fine_tune',(1,)),('fit_flat_cos',(1,)),('fit_sgdr',(1,1))):
        dls,cb = route(way, store, imgs)
        learn,check = learner(dls, path=tmp_path, splitter=lambda m: L(list(m[0].parameters()), list(m[-1].parameters()))),Check()
        iter_fit(learn, how, *args, cbs=[cb,check,SaveModelCallback(monitor='accuracy', fname='best'),EarlyStoppingCallback(patience=3),ReduceLROnPlateau(), CSVLogger()])
        assert check.n==(96 if how=='fine_tune' else 48)
        assert list(learn.recorder.metric_names)[1:-1]==['train_loss','valid_loss','accuracy','task_loss','kd_loss']
        assert cb._teacher._dl is None and not any(isinstance(o, KD) for o in learn.cbs)

def test_values(trained):
    "Metrics, predictions, losses are those of a plain Learner"
    p = plain(trained)
    assert quiet(trained, lambda l: l.validate())==quiet(p, lambda l: l.validate())
    for ds in (0,1):
        a,b = [quiet(o, lambda l: l.get_preds(ds_idx=ds, with_loss=True, with_decoded=True, with_input=True)) for o in (trained,p)]
        assert len(a)==len(b)==5 and all(torch.equal(u.as_subclass(Tensor), v.as_subclass(Tensor)) for u,v in zip(a, b)) and all(type(u) is type(v) for u,v in zip(a, b))
    fs = trained.dls.valid_ds.items[:5]
    a,b = [quiet(o, lambda l: l.get_preds(dl=l.dls.test_dl(fs))) for o in (trained,p)]
    assert torch.equal(a[0], b[0]) and a[1] is b[1] is None
    a,b = [quiet(o, lambda l: l.get_preds(dl=l.dls.test_dl(fs, with_labels=True))) for o in (trained,p)]
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    a,b = [quiet(o, lambda l: l.predict(fs[0])) for o in (trained,p)]
    assert a[0]==b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2])
    for kw in ({}, dict(ds_idx=0)): 
        a,b = [quiet(o, lambda l: (set_seed(0),l.tta(n=2, **kw))[1]) for o in (trained,p)]
        assert torch.allclose(a[0], b[0]) and torch.equal(a[1], b[1])

def test_dls(trained, imgs):
    dls,p = trained.dls,image_dls(imgs)
    assert dls.c==4 and list(dls.vocab)==list('abcd') and get_c(dls)==4 and dls.n_inp==1 and dls.loss_func is not None
    assert len(dls.train)==len(p.train) and len(dls.train.dataset)==54 and dls.train_ds[0][1]==p.train_ds[0][1]
    def good(dl):
        n = 0
        for b in dl:
            if len(b)==3: assert right(b[2], b[0])
            n += len(b[0])
        return n
    assert good(dls.train)==48 and good(dls.train.new(bs=8))==48 and good(dls.train.new(shuffle=False, drop_last=False))==54
    assert good(dls.valid)==18 and good(dls.test_dl(dls.valid_ds.items))==18
    for b in dls.train.new(bs=8): assert len(b[0])==8
    b = dls.new(bs=4).one_batch()
    assert len(b[0])==4 and len(b)==len(dls.train.one_batch()) and good([b])==4
    assert len(dls.new_empty().train.dataset)==0

def test_pictures(trained):
    plt.switch_backend('agg')
    dls = trained.dls
    dls.show_batch(max_n=4); dls.train.show_batch(max_n=2, unique=True); dls.valid.show_batch(max_n=2); dls.show_batch(dls.train.one_batch(), max_n=3)
    for ds in (0,1): quiet(trained, lambda l: l.show_results(ds_idx=ds, max_n=4))
    quiet(trained, lambda l: l.show_results(dl=l.dls.test_dl(l.dls.valid_ds.items, with_labels=True), max_n=4))
    interp = quiet(trained, ClassificationInterpretation.from_learner)
    interp.plot_top_losses(4); interp.plot_confusion_matrix(); interp.most_confused(); interp.print_classification_report()
    assert interp.confusion_matrix().sum()==18
    for ds in (0,1):
        i = quiet(trained, lambda l: Interpretation.from_learner(l, ds_idx=ds))
        i.plot_top_losses(2); assert len(i.top_losses(3)[0])==3
    quiet(trained, lambda l: l.summary())
    plt.close('all')

def test_copies(trained):
    "Pickles and copies of the data go on as the data do"
    for o in (pickle.loads(pickle.dumps(trained.dls)),copy.deepcopy(trained.dls),copy.copy(trained.dls)):
        b = o.train.one_batch()
        assert len(b)==len(trained.dls.train.one_batch())
        if len(b)==3: assert right(b[2], b[0])
    trained.save('w'); trained.load('w')
    l = copy.deepcopy(trained)
    iter_fit(l)

def test_lr_find(trained):
    before = trained.model[-1].weight.clone()
    quiet(trained, lambda l: l.lr_find(num_it=12, show_plot=False))
    assert torch.equal(before, trained.model[-1].weight)

def test_export(store, imgs, tmp_path):
    "An export predicts where there is neither store nor fastkd"
    st,want = precompute(Oracle(), image_dls(imgs), tmp_path/'s'),[]
    for way in [*ways,'loss']:
        dls,cb = route('attach' if way=='loss' else way, st, imgs)
        learn = learner(dls, path=tmp_path, **(dict(loss_func=DistillationLoss()) if way=='loss' else dict(cbs=cb)))
        iter_fit(learn)
        learn.export(f'{way}.pkl')
        want.append(quiet(learn, lambda l: l.predict(dls.valid_ds.items[0])))
        b = (tmp_path/f'{way}.pkl').read_bytes()
        # the name may be part of a path
        assert b'fastkd.' not in b and str(tmp_path/'s').encode() not in b
    shutil.rmtree(tmp_path/'s')
    code = f"""
        import sys; sys.modules['fastkd'] = None
        import warnings; warnings.simplefilter('ignore')
        from fastai.vision.all import *
        for way in {[*ways,'loss']}:
            learn = load_learner(Path({str(tmp_path)!r})/f'{{way}}.pkl')
            with learn.no_bar():
                c,_,p = learn.predict(Path({str(dls.valid_ds.items[0])!r}))
                learn.get_preds(dl=learn.dls.test_dl([Path({str(dls.valid_ds.items[0])!r})]))
            print([c, p.tolist()])
        """
    r = subprocess.run([sys.executable,'-c',textwrap.dedent(code)], capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode==0, r.stderr[-2000:]
    for line,(c,_,p) in zip(r.stdout.splitlines(), want):
        got = eval(line)
        assert got[0]==c and np.allclose(got[1], p, atol=1e-5)

def test_plain_fit(way, store, imgs, tmp_path):
    "The user's DataLoaders, the order of their epochs and the weights are those of a fit without distillation"
    def _run(make, **kwargs):
        dls,cb = make()
        dl,seen = dls.train,[]
        before = {k:(v,copy.copy(getattr(v, '__dict__', None))) for k,v in dl.__dict__.items() if k!='rng'}
        class See(Callback):
            order = 99
            def after_batch(self): seen.append((self.training,self.x.clone(),self.y.clone(),self.loss.item()))
        learn = learner(dls, path=tmp_path)
        set_seed(5)
        dls.train.rng = random.Random(7)
        iter_fit(learn, 'fit', 2, 1e-2, cbs=[*L(cb),See()])
        iter_fit(learn, 'fit', 1, 1e-2, cbs=[*L(cb),See()])
        assert learn.dls is dls and learn.dls.train is dl and all(dl.__dict__[k] is v for k,(v,_) in before.items())
        if cb and way=='callback':
            assert {*dl.__dict__}-{'rng'}=={*before}
            for v,d in before.values(): assert not isinstance(v, Pipeline) or v.__dict__==d
        return seen,dl.rng.getstate(),learn.model[-1].weight.clone()
    a,b = _run(lambda: (image_dls(imgs),None)),_run(lambda: (route(way, store, imgs)[0],KD(*([store] if way=='callback' else []), alpha=0, task_weight=1.)))
    assert len(a[0])==len(b[0]) and all(u[0]==v[0] and torch.equal(u[1], v[1]) and torch.equal(u[2].as_subclass(Tensor), v[2].as_subclass(Tensor)) and u[3]==v[3] for u,v in zip(a[0], b[0]))
    assert a[1]==b[1] and torch.equal(a[2], b[2])

@pytest.mark.parametrize('mix', [MixUp,CutMix])
def test_mixing(way, store, imgs, mix, tmp_path):
    "The answer is mixed of those to the very pictures that the input is mixed of"
    dls,cb = route(way, store, imgs)
    clean = torch.cat([b[0] for b in dls.train.new(shuffle=False, drop_last=False)]).as_subclass(Tensor)
    p,n = Oracle()(clean).softmax(1),[]
    class See(Callback):
        order = KD.order+1
        def before_batch(self): self.cb = first(c for c in self.learn.cbs if isinstance(c, mix))
        def after_loss(self):
            if not self.training: return
            x,lam = self.x.as_subclass(Tensor),self.cb.lam.float()
            t = self.learn.knowledge_distillation._teacher(x, T=1.).softmax(1)
            for k in range(len(x)):
                l = lam[k] if lam.numel()>1 else lam.squeeze()
                if mix is MixUp: # the pair of pictures, and the share, that give this one
                    err = torch.stack([(l*a+(1-l)*clean-x[k]).abs().amax((1,2,3)) for a in clean])
                    i,j = divmod(err.argmin().item(), len(clean))
                    assert err[i,j]<1e-4
                    want = l*p[i]+(1-l)*p[j]
                else: # pixels are of one picture or of the other
                    same = (clean==x[k]).float().mean((1,2,3))
                    ways_ = [(i,j) for i in range(len(clean)) for j in range(len(clean)) if ((clean[i]==x[k])|(clean[j]==x[k])).all()]
                    want = torch.stack([l*p[i]+(1-l)*p[j] for i,j in ways_])
                    assert ((want-t[k]).abs().amax(1)<1e-3).any()
                    n.append(k); continue
                assert (want-t[k]).abs().max()<1e-3
                n.append(k)
    learn = learner(dls, path=tmp_path)
    iter_fit(learn, cbs=[cb,See(),mix(.8)])
    assert len(n)==48 and learn.validate()

# ---- alignment

def aligned(dls, store=None, f=None, n=None, epochs=1):
    "Number of items whose answers were compared with their inputs"
    res = store.attach(dls) if store is not None else dls
    got = 0
    for _ in range(epochs):
        for b in res.train:
            assert len(b)==3 and right(b[-1], b[0], f or Oracle())
            got += len(b[0])
    return got

@pytest.mark.parametrize('kw', [dict(num_workers=2), dict(drop_last=True), dict(drop_last=False, bs=7), dict(shuffle=False), dict(bs=54)], ids=str)
def test_loaders(store, imgs, kw): assert aligned(image_dls(imgs, **kw), store, epochs=2)>=96

@pytest.mark.parametrize('seed', range(6))
def test_random_subsets(store, imgs, seed):
    "Any subset, split and order"
    r = np.random.default_rng(seed)
    fs = get_image_files(imgs)
    sub = r.choice(len(fs), r.integers(20, len(fs)), replace=False)
    items = L(fs[int(i)] for i in sub)
    split = [RandomSplitter(.3), RandomSubsetSplitter(.4,.3), IndexSplitter(r.permutation(len(items))[:6].tolist()), EndSplitter(.2), TrainTestSplitter(test_size=.3, stratify=[o.parent.name for o in items])][seed%5]
    dls = images(get_items=None, splitter=split, blocks=()).dataloaders(items, bs=int(r.integers(2,9)), path=imgs, num_workers=0)
    vocab = list(dls.vocab)
    if vocab!=list('abcd'): return
    assert aligned(dls, store, epochs=2)
    learn,check = learner(dls),Check()
    iter_fit(learn, cbs=[KD(store),check]); assert check.n

def test_folds(store, imgs):
    fs = get_image_files(imgs)
    for k in range(3):
        dls = image_dls(imgs, block=dict(splitter=IndexSplitter(list(range(k, len(fs), 3)))))
        assert aligned(dls, store)==48

def test_weighted_and_partial(store, imgs):
    db,src = images(),imgs
    w = np.arange(n_imgs)+.1
    for dls in (db.weighted_dataloaders(src, w, bs=16, path=imgs, num_workers=0), db.datasets(src).partial_dataloaders(24, bs=8, path=imgs, after_item=db.item_tfms, after_batch=db.batch_tfms, num_workers=0)):
        assert aligned(dls, store, epochs=2)>=48
        learn,check = learner(dls),Check()
        iter_fit(learn, cbs=[KD(store),check]); assert check.n>=24
    dls = images((TeacherBlock(store),)).weighted_dataloaders(src, w, bs=16, path=imgs, num_workers=0)
    assert aligned(dls)==48

class Skip(Transform):
    "Leaves some items out"
    def __init__(self, bad): self.bad = bad
    def encodes(self, x:PILImageBW):
        if np.array(x).sum() in self.bad: raise SkipItemException
        return x

@pytest.mark.parametrize('num_workers', [0,2])
def test_skipped_items(imgs, tmp_path, num_workers):
    total = lambda o: np.array(PILImageBW.create(o)).sum()
    plain = image_dls(imgs)
    bad = {total(o) for o in get_image_files(imgs)[::3]}-{total(o[0]) for o in (plain.train.items,plain.valid.items)}
    dls = image_dls(imgs, block=dict(item_tfms=Skip(bad)), num_workers=num_workers, bs=8)
    st = precompute(Oracle(), dls, tmp_path/'s')
    assert len(st)<n_imgs
    with pytest.raises(ValueError, match='no stored answer'): st.attach(dls)
    full = precompute(Oracle(), image_dls(imgs), tmp_path/'t')
    full.manifest['tfms'] = describe_tfms(dls.train, imgs)
    assert 0<aligned(dls, full, epochs=2)<96

def test_duplicates(store, imgs):
    "An item that is there twice has one answer"
    fs = get_image_files(imgs)
    dls = images(get_items=None, splitter=EndSplitter(.2)).dataloaders(L(fs)+L(fs), bs=16, path=imgs, num_workers=0)
    assert aligned(dls, store)==112

def test_moved_folder(store, imgs, tmp_path):
    shutil.copytree(imgs, tmp_path/'elsewhere')
    assert aligned(image_dls(tmp_path/'elsewhere'), store)==48
    with pytest.raises(ValueError, match=r'54 of 54 training items have no stored answer.*such as .*png.*relative to the `path`'): store.attach(images().dataloaders(tmp_path/'elsewhere', bs=16, num_workers=0))

def test_factories(imgs, tmp_path):
    fs = get_image_files(imgs)
    df = pd.DataFrame({'name':[o.relative_to(imgs).as_posix() for o in fs], 'label':[o.parent.name for o in fs]})
    df.to_csv(imgs/'labels.csv', index=False)
    kw = dict(bs=8, num_workers=0, seed=0, img_cls=PILImageBW, batch_tfms=Normalize.from_stats([.3],[.3]))
    make = dict(folder=lambda p: ImageDataLoaders.from_folder(p, valid_pct=.25, **kw), func=lambda p: ImageDataLoaders.from_name_func(p, get_image_files(p), lambda nm: 'ab'[int(nm[:4])%2], **kw),
        df=lambda p: ImageDataLoaders.from_df(df, p, **kw), csv=lambda p: ImageDataLoaders.from_csv(p, **kw), re=lambda p: ImageDataLoaders.from_path_re(p, get_image_files(p), r'/([a-d])/[^/]*$', **kw))
    shutil.copytree(imgs, tmp_path/'moved')
    for k,f in make.items():
        dls = f(imgs)
        st = precompute(Oracle(dls.c), dls, tmp_path/k)
        assert aligned(f(tmp_path/'moved'), st, Oracle(dls.c))>=48, k
        dls.show_batch(max_n=1); st.attach(dls).show_batch(max_n=1)
    plt.close('all')

def test_distributed(store, imgs, monkeypatch):
    "Each process has its share of the items, with their answers"
    import types
    if 'accelerate' not in sys.modules:
        fake = types.ModuleType('accelerate')
        class Accelerator:
            def __init__(self, device_placement=True): pass
        fake.Accelerator = Accelerator
        monkeypatch.setitem(sys.modules, 'accelerate', fake)
    from fastai.distributed import DistributedDL
    monkeypatch.setattr(DistributedDL, '_broadcast', lambda self, t, rank: list(t))
    for num_workers in (0,2):
        seen = []
        for rank in range(2):
            dls = image_dls(imgs, num_workers=num_workers, bs=4, shuffle=False, drop_last=False)
            for dl in (DistributedDL(store.attach(dls).train, rank, 2), track(DistributedDL(dls.train, rank, 2), store, imgs, add=True)):
                for b in dl: assert len(b)==3 and right(b[-1], b[0])
            dl = track(DistributedDL(dls.train, rank, 2), store, imgs)
            for b in dl:
                assert len(b)==2 and right(dl.answers(), b[0])
                seen += dl.items_now.tolist()
        assert sorted(seen)==list(range(54))
    class Share(Callback):
        "What fastai's `DistributedTrainer` does to batches"
        order = 11
        def before_train(self): self.learn.dl = DistributedDL(self.learn.dl, 1, 2)
    for way in ways:
        dls,cb = route(way, store, imgs, bs=8)
        learn,check = learner(dls),Check()
        iter_fit(learn, cbs=[cb,check,Share()])
        assert check.n==24

def test_fastai_dataloader(tmp_path):
    "Data sets without `items` need a key; torch's DataLoader does not tell the order"
    x,y = torch.randn(40,1,sz,sz),torch.randint(0, n_cls, (40,))
    ds = list(zip(x, y))
    dls = DataLoaders(DataLoader(ds, bs=8, shuffle=True),DataLoader(ds[:8], bs=8))
    with pytest.raises(ValueError, match='pass `key=`'): precompute(Oracle(), dls, tmp_path/'s', task='softmax')
    st = precompute(Oracle(), dls, tmp_path/'s', task='softmax', key=lambda i: i)
    assert aligned(dls, st)==40
    learn,check = Learner(dls, small(), loss_func=F.cross_entropy),Check()
    iter_fit(learn, cbs=[KD(st),check]); assert check.n==40
    learn = Learner(st.attach(dls), small(), loss_func=F.cross_entropy)
    iter_fit(learn, cbs=[KD(),Check()])
    assert learn.validate()
    raw = DataLoaders(torch.utils.data.DataLoader(ds, 8, shuffle=True),torch.utils.data.DataLoader(ds, 8))
    with pytest.raises(ValueError, match='fastai.*DataLoader.*torch.utils.data'): st.attach(raw)
    learn = Learner(raw, small(), loss_func=F.cross_entropy)
    with pytest.raises(ValueError, match='fastai.*DataLoader.*torch.utils.data'): iter_fit(learn, cbs=KD(st))

# ---- kinds of data

def compare(dls, store, learn, f, n, cb=None, atol=1e-3, **kwargs):
    "A fit from the store, and one with attached batches, in which every answer is `f` of its input"
    seen = []
    class See(Callback):
        order = KD.order+1
        def after_loss(self):
            if not self.training: return
            t,want = self.learn.knowledge_distillation._teacher._dl.answers(),f(*self.learn.xb)
            for a,b in zip(t.values(), want.values()) if isinstance(t, dict) else [(t,want)]:
                a,b = a.as_subclass(Tensor).float(),b.as_subclass(Tensor).float()
                if store.spec['task']=='softmax': a,b = a-a.mean(1, keepdim=True),b-b.mean(1, keepdim=True)
                assert torch.allclose(a, b, atol=atol)
            seen.append(len(a))
    for make in (lambda: (dls,KD(store, **kwargs)),lambda: (store.attach(dls),KD(**kwargs))):
        seen.clear()
        data,cb = make()
        l = learn(data)
        iter_fit(l, cbs=[cb,See()])
        assert sum(seen)>=n
        quiet(l, lambda l: l.validate())
        if not isinstance(store.spec['shape'], dict): quiet(l, lambda l: l.get_preds())
    assert is_answer(data.train.one_batch()[-1])
    return l

def table():
    d = load_breast_cancer(as_frame=True)
    df = d.frame.iloc[:120, [0,1,2,3,4,-1]].copy()
    df.columns = ['a','b','x','y','z','target']
    df['size'],df['target'] = pd.cut(df['a'], 3, labels=['s','m','l']).astype(str),df['target'].map({0:'bad',1:'good'})
    df.loc[df.index[::9],'y'] = np.nan
    return df.set_index(np.random.default_rng(0).permutation(len(df))+1000)

def table_dls(df, **kwargs):
    from fastai.tabular.all import TabularPandas,Categorify,FillMissing,Normalize as N
    return TabularPandas(df, kwargs.pop('procs', [Categorify,FillMissing,N]), ['size'], ['a','b','x','y','z'], 'target', splits=kwargs.pop('splits', None) or RandomSplitter(.2, seed=0)(range_of(df))).dataloaders(bs=16, **kwargs)

class TabOracle(nn.Module):
    def forward(self, cat, cont): return torch.stack([cont.sum(1)*3+cat.sum(1), cont[:,0]-cont[:,1]*2],1)
class Tab(nn.Module):
    def __init__(self): super().__init__(); self.l = nn.Linear(7,2)
    def forward(self, cat, cont): return self.l(torch.cat([cat.float(),cont],1))

def test_tabular(tmp_path):
    from fastai.tabular.all import TabularLearner
    df = table()
    dls = table_dls(df)
    st = precompute(TabOracle(), dls, tmp_path/'s')
    l = compare(dls, st, lambda d: TabularLearner(d, Tab(), metrics=accuracy, path=tmp_path), TabOracle(), 96)
    l.show_results(); l.dls.show_batch()
    assert len(l.predict(df.iloc[0]))==3 and quiet(l, lambda l: l.get_preds(dl=l.dls.test_dl(df.iloc[:5].drop(columns='target'))))[0].shape==(5,2)
    l.export('t.pkl'); assert len(load_learner(tmp_path/'t.pkl').predict(df.iloc[0]))==3
    # rows in another order, with the same index; the sums of `Normalize` would differ in their last digits
    from fastai.tabular.all import Categorify,FillMissing
    st = precompute(TabOracle(), dls:=table_dls(df, procs=[Categorify,FillMissing]), tmp_path/'o')
    o = np.random.default_rng(1).permutation(len(df))
    tr = set(df.index[dls.train.items.index.map(lambda i: df.index.get_loc(i))])
    df2 = df.iloc[o]
    sp = [i for i,k in enumerate(df2.index) if k in tr],[i for i,k in enumerate(df2.index) if k not in tr]
    compare(table_dls(df2, splits=sp, procs=[Categorify,FillMissing]), st, lambda d: TabularLearner(d, Tab(), path=tmp_path), TabOracle(), 96)
    with pytest.raises(ValueError, match='index of the table has duplicates.*reset_index'): precompute(TabOracle(), table_dls(df.set_axis([0,*range(len(df)-1)])), tmp_path/'d')
    with pytest.raises(ValueError, match="'nope' is not a column"): precompute(TabOracle(), dls, tmp_path/'e', key='nope')

def test_reindexed_table(tmp_path):
    "The names are there, but they are those of other rows: found while training"
    from fastai.tabular.all import TabularLearner
    df = table()
    dls = table_dls(df)
    st = precompute(TabOracle(), dls, tmp_path/'s')
    bad = df.set_axis(np.roll(df.index, 1))
    with pytest.raises(ValueError, match='input of row .* is not the one that the teacher saw'): iter_fit(TabularLearner(table_dls(bad), Tab(), path=tmp_path), cbs=KD(st))

def test_relabelled(store, imgs, tmp_path):
    "Other pictures under the same names"
    shutil.copytree(imgs, tmp_path/'i')
    fs = sorted(get_image_files(tmp_path/'i'))
    bs = [p.read_bytes() for p in fs]
    for p,b in zip(fs, bs[1:]+bs[:1]): p.write_bytes(b)
    with pytest.raises(ValueError, match=r'input of .*\.png is not the one that the teacher saw'): iter_fit(learner(image_dls(tmp_path/'i')), cbs=KD(store))

def sentences(n=60):
    r = np.random.default_rng(0)
    return pd.DataFrame({'text':[' '.join(r.choice(['good','bad','film','plot','fine','dull','long','short','story'], r.integers(3,12))) for _ in range(n)], 'label':r.choice(['neg','pos'], n)}, index=np.arange(n)*7+3)
class Words(nn.Module):
    "A bag of words; padding is 1"
    def __init__(self, n, seed=None):
        super().__init__()
        self.e = nn.Embedding(n, 2, padding_idx=1)
        if seed is not None: self.e.weight.data = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)); self.e.weight.data[1] = 0
    def forward(self, x): return self.e(x.as_subclass(Tensor)).sum(1)

def test_text(tmp_path):
    from fastai.text.all import TextBlock,SortedDL,BaseTokenizer,ColReader,TextLearner,Tokenizer
    df = sentences()
    block = lambda: DataBlock(blocks=(TextBlock.from_df('text', tok=BaseTokenizer(), min_freq=1),CategoryBlock), get_x=ColReader('text'), get_y=ColReader('label'), splitter=RandomSplitter(.2, seed=0))
    kw = dict(bs=8, num_workers=0, dl_type=SortedDL)
    dls = block().dataloaders(df, **kw)
    assert isinstance(dls.train, SortedDL)
    f = Words(len(dls.vocab[0]), 1)
    st = precompute(f, dls, tmp_path/'s')
    l = compare(dls, st, lambda d: Learner(d, Words(len(dls.vocab[0])), metrics=accuracy, path=tmp_path), f, 48)
    l.dls.show_batch(); l.predict('a good film'); l.export('t.pkl')
    assert len(load_learner(tmp_path/'t.pkl').predict('a dull film'))==3
    assert sum(len(b[0]) for b in st.attach(dls).train.new(bs=4))>=40
    # the same texts split by another seed have the same words
    b2 = block(); b2.splitter = RandomSplitter(.2, seed=0)
    compare(b2.dataloaders(df, **{**kw, 'bs':16}), st, lambda d: Learner(d, Words(len(dls.vocab[0])), path=tmp_path), f, 48)
    with pytest.raises(ValueError, match='prepared otherwise(.|\n)*Numericalize'): st.attach(block().dataloaders(pd.concat([df, pd.DataFrame({'text':['unheard of']*9,'label':'pos'}, index=range(1000,1009))]), **kw))
    lm = DataBlock(blocks=TextBlock.from_df('text', is_lm=True, tok=BaseTokenizer(), min_freq=1), get_x=ColReader('text'), splitter=RandomSplitter(.2, seed=0)).dataloaders(df, bs=2, seq_len=8)
    with pytest.raises(ValueError, match='language model'): track(lm.train)

class Ink(nn.Module):
    def forward(self, x): return torch.stack([x[:,0],1-x[:,0],x[:,0]*2],1).as_subclass(Tensor)

def test_segmentation(tmp_path):
    dls = digits_dls(96, task='ink', bs=16)
    st = precompute(Ink(), dls, tmp_path/'s')
    assert st.spec['shape']==[3,8,8]
    l = compare(dls, st, lambda d: digits_learner(d), Ink(), 96)
    l.dls.show_batch(max_n=2); l.show_results(max_n=2); plt.close('all')

@pytest.mark.parametrize('task,c', [('traits',3),('center',2)])
def test_labels_and_values(task, c, tmp_path):
    dls = digits_dls(96, task=task, bs=16)
    f = Oracle(c, 64)
    st = precompute(f, dls, tmp_path/'s')
    assert st.spec['task']=={'traits':'binary','center':'regress'}[task]
    l = compare(dls, st, lambda d: digits_learner(d), f, 96)
    l.dls.show_batch(max_n=2); plt.close('all')

class Heads(nn.Module):
    def __init__(self, f, g): super().__init__(); self.f,self.g = f,g
    def forward(self, x): return {'a':self.f(x),'b':self.g(x)}

def test_heads(tmp_path):
    "Several outputs, each with its own answers"
    dls = digits_dls(96, bs=16)
    f = Heads(Oracle(10, 64),Oracle(5, 64, 2))
    spec = dict(kind='dense', shape={'a':[10],'b':[5]}, task='softmax', axis=0, T=None, k=16, tail='sample', dtype='float32')
    st = TargetStore.create(tmp_path/'s', make_manifest(spec, tfms=describe_tfms(dls.train, dls.path)))
    dl = track(dls.train.new(shuffle=False, drop_last=False), root=dls.path)
    with TargetWriter(st, dl._t.keys) as w:
        for b in dl: w.put(dl._t.keys[dl.items_now], f(b[0]))
    st = TargetStore(tmp_path/'s')
    compare(dls, st, lambda d: Learner(d, Heads(tiny_cnn(),tiny_cnn(c=5)), loss_func=lambda p,y: F.cross_entropy(p['a'], y)), f, 96, loss=DictLoss({'a':'kd','b':'kd'}))

def test_no_labels(imgs, tmp_path):
    "Pictures alone, learned from the stored answers"
    block = lambda *b: DataBlock(blocks=(ImageBlock(PILImageBW),*b), get_items=get_image_files, splitter=RandomSplitter(.25, seed=0), batch_tfms=Normalize.from_stats([.3],[.3])).dataloaders(imgs, bs=16, path=imgs, num_workers=0)
    st = precompute(Oracle(), block(), tmp_path/'s', task='softmax')
    for dls,cb in ((block(),KD(st, alpha=1.)),(st.attach(block()),KD(alpha=1.)),(block(TeacherBlock(st)),KD(alpha=1.))):
        learn,check = Learner(dls, small(), loss_func=CrossEntropyLossFlat()),Check()
        check.after_loss = lambda: None
        before = learn.model[-1].weight.clone()
        with learn.no_bar(), learn.no_logging(), pytest.MonkeyPatch.context() as m:
            m.setattr(learn, '_do_epoch_validate', lambda *a,**k: None)
            learn.fit(1, cbs=cb)
        assert not torch.equal(before, learn.model[-1].weight)
    assert right((b:=dls.train.one_batch())[-1], b[0])

# ---- what does not fit

def resized(size, method='squish', batch=(), **kwargs): return image_dls(kwargs.pop('path'), block=dict(item_tfms=Resize(size, method), batch_tfms=list(batch)))

def test_other_transforms(imgs, tmp_path):
    norm = Normalize.from_stats([.3],[.3])
    st = precompute(Oracle(d=256), resized(16, path=imgs, batch=[norm]), tmp_path/'s')
    assert aligned(resized(16, path=imgs, batch=[norm]), st, Oracle(d=256))==48
    for kw,words in ((dict(size=24, batch=[norm]), ['size=[16, 16]','size=[24, 24]']), (dict(size=16, method='crop', batch=[norm]), ["method='squish'","method='crop'"]),
                     (dict(size=16, batch=[Normalize.from_stats([.5],[.3])]), ['Normalize(','[0.3]','[0.5]']), (dict(size=16), ['Normalize('])):
        dls = resized(path=imgs, **kw)
        for f in (st.attach, lambda d: iter_fit(learner(d), cbs=KD(st))):
            with pytest.raises(ValueError) as e: f(dls)
            assert all(o in str(e.value) for o in ['prepared otherwise','transforms: stored',*words]), str(e.value)
    with pytest.raises(ValueError, match='random transforms.*Flip'): precompute(Oracle(d=256), resized(16, path=imgs, batch=[*aug_transforms(),norm]), tmp_path/'a')

def test_vocab(store, imgs, tmp_path):
    "Classes are found by name"
    def _dls(vocab, keep='abcd'): return images(blocks=(), get_items=lambda p: L(o for o in get_image_files(p) if o.parent.name in keep)).dataloaders(imgs, bs=8, path=imgs, num_workers=0) if vocab is None else \
        DataBlock(blocks=(ImageBlock(PILImageBW),CategoryBlock(vocab, sort=False)), get_items=get_image_files, get_y=parent_label, splitter=RandomSplitter(.25, seed=0), batch_tfms=Normalize.from_stats([.3],[.3])).dataloaders(imgs, bs=8, path=imgs, num_workers=0)
    f = Oracle()
    with pytest.warns(UserWarning, match='another order.*aligned by name'): dls = store.attach(_dls(['d','b','a','c']))
    for b in dls.train: assert right(b[-1], b[0], lambda x: f(x)[:,[3,1,0,2]])
    with pytest.warns(UserWarning, match='are more than the student'): dls = store.attach(_dls(None, 'abd'))
    assert list(dls.vocab)==list('abd')
    for b in dls.train: assert right(b[-1], b[0], lambda x: f(x)[:,[0,1,3]])
    with pytest.raises(ValueError, match="'e'"): store.attach(_dls(list('abcde')))

def test_missing_items(imgs, tmp_path):
    "A training item without an answer is named; one in validation needs none"
    fs = get_image_files(imgs)
    new = fs.filter(lambda o: o.stem!=fs[0].stem and o.stem!=fs[1].stem)
    make = lambda items,split: images(get_items=None, splitter=split).dataloaders(items, bs=8, path=imgs, num_workers=0)
    st = precompute(Oracle(), make(new, EndSplitter(.2)), tmp_path/'s')
    dls = make(fs, IndexSplitter([0]))
    for f in (st.attach, lambda d: iter_fit(learner(d), cbs=KD(st))):
        with pytest.raises(ValueError, match=rf'1 of {len(fs)-1} training items have no stored answer.*such as .*{fs[1].name}.*precompute_targets'): f(dls)
    dls = make(fs, IndexSplitter([0,1]))
    assert aligned(dls, st)>=64
    learn = learner(st.attach(dls)); iter_fit(learn, cbs=KD())
    assert len(learn.dls.test_dl(fs[:2]).one_batch())==1 and learn.predict(fs[0])[0] in 'abcd'

def test_blocks(store, imgs, tmp_path):
    with pytest.raises(ValueError, match='needs its store'): DataBlock(blocks=(ImageBlock,CategoryBlock,TeacherBlock))
    with pytest.raises(ValueError, match='takes one'): DataBlock(blocks=(ImageBlock,TeacherBlock(store),TeacherBlock(store)))
    with pytest.raises(FileNotFoundError): TeacherBlock(tmp_path/'none')
    with pytest.raises(TypeError, match='takes DataLoaders'): store.attach(image_dls(imgs).train)
    db = images((TeacherBlock(str(store.path)),), getters=[noop,parent_label,noop], get_y=None)
    assert aligned(copy.deepcopy(db).dataloaders(imgs, bs=16, path=imgs, num_workers=0))==48
    with pytest.raises(ValueError, match='there is no teacher'): iter_fit(learner(image_dls(imgs)), cbs=KD())

def test_distillation_loss(store, imgs, tmp_path):
    "Without a callback: the same loss"
    def _run(loss, cb): 
        learn,seen = learner(store.attach(image_dls(imgs)), path=tmp_path, **loss),[]
        set_seed(3); learn.dls.train.rng = random.Random(3)
        class See(Callback):
            order = KD.order+1
            def after_loss(self): seen.append(self.loss.item())
        iter_fit(learn, 'fit', 2, 1e-2, cbs=[*L(cb),See()])
        return learn,seen
    (a,u),(b,v) = _run(dict(loss_func=DistillationLoss(T=2., alpha=.3), metrics=[]), None),_run({}, KD(T=2., alpha=.3))
    assert np.allclose(u, v, atol=1e-5)
    assert len(quiet(a, lambda l: l.validate()))==1
    p,y,l = quiet(a, lambda l: l.get_preds(with_loss=True))
    assert torch.allclose(l.as_subclass(Tensor), F.cross_entropy(a.model(torch.cat([b[0] for b in a.dls.valid])).as_subclass(Tensor), y.as_subclass(Tensor), reduction='none'), atol=1e-4)
    quiet(a, lambda l: l.get_preds(ds_idx=0)); plt.switch_backend('agg')
    for ds in (0,1): quiet(a, lambda l: l.show_results(ds_idx=ds, max_n=2))
    plt.close('all')

# ---- the fingerprint of transforms

def lower(o, by=0): return o
def test_fingerprint(imgs):
    dls = lambda item=(), batch=(), **kw: image_dls(imgs, block=dict(item_tfms=list(item), batch_tfms=list(batch), **kw)).train
    say = lambda *a, **kw: describe_tfms(dls(*a, **kw), imgs)
    variants = [([],[]), ([Resize(16)],[]), ([Resize(24)],[]), ([Resize(16, 'squish')],[]), ([Resize(16, pad_mode='border')],[]), ([RandomResizedCrop(16)],[]), ([RandomResizedCrop(16, min_scale=.5)],[]), ([RandomResizedCrop(16, ratio=(1,1))],[]),
        ([],aug_transforms()), ([],aug_transforms(max_rotate=20)), ([],aug_transforms(do_flip=False)), ([],aug_transforms(max_lighting=.5)), ([],aug_transforms(p_affine=.5)), ([],aug_transforms(size=8)), ([],aug_transforms(max_zoom=1.5)), ([],aug_transforms(max_warp=.4)), ([],aug_transforms(flip_vert=True)),
        ([],[Normalize.from_stats([.3],[.3])]), ([],[Normalize.from_stats([.3],[.4])]), ([],[RandomErasing()]), ([],[RandomErasing(p=.1)]),
        ([Transform(lower)],[]), ([Transform(partial(lower, by=1))],[]), ([Transform(partial(lower, by=2))],[])]
    said = [str(say(*o)) for o in variants]
    twice = [(said[i],variants[i],variants[j]) for i in range(len(said)) for j in range(i) if said[i]==said[j]]
    assert not twice, twice
    assert said==[str(say(*o)) for o in variants]
    assert len({str(say(get_x=o)) for o in (noop,partial(lower, by=1),partial(lower, by=2))})==3
    # use leaves no trace
    dl = dls([RandomResizedCrop(16)], [*aug_transforms(),Normalize.from_stats([.3],[.3])])
    before = describe_tfms(dl)
    for _ in dl: pass
    dl.show_batch(max_n=1); plt.close('all')
    assert describe_tfms(dl)==before==describe_tfms(track(dl)) and not any('0x' in o for o in before)

def test_fingerprint_of_tables_and_texts():
    from fastai.tabular.all import Categorify,FillMissing,FillStrategy,Normalize as N,TabularPandas
    df = table()
    def say(df, procs=(Categorify,FillMissing,N)):
        dl = table_dls(df, procs=list(procs)).train
        a = describe_tfms(dl); [_ for _ in dl]
        assert describe_tfms(dl)==a
        return str(a)
    other = df.copy(); other['x'] *= 2
    more = df.copy(); more['size'] = more['size'].replace('s', 'xl')
    gap = df.copy(); gap.loc[gap.index[::7],'z'] = np.nan
    said = [say(df),say(other),say(more),say(gap),say(df, [Categorify,FillMissing]),say(df, [Categorify,FillMissing(fill_strategy=FillStrategy.constant),N])]
    assert len(set(said))==len(said) and say(df)==said[0]

code = """
    import sys,warnings; warnings.simplefilter('ignore')
    sys.path.insert(0, {tests!r})
    from test_targets_data import *
    import torch.multiprocessing as mp
    if __name__=='__main__':
        print(fingerprints(Path({imgs!r})))
        mp.set_start_method('spawn', force=True)
        print(aligned(image_dls(Path({imgs!r}), num_workers=1), TargetStore({store!r})))
    """
def fingerprints(imgs):
    from fastai.text.all import TextBlock,BaseTokenizer,ColReader
    dl = image_dls(imgs, block=dict(item_tfms=RandomResizedCrop(16), batch_tfms=[*aug_transforms(),Normalize.from_stats([.3],[.3])])).train
    t = DataBlock(blocks=(TextBlock.from_df('text', tok=BaseTokenizer(), min_freq=1),CategoryBlock), get_x=ColReader('text'), get_y=ColReader('label'), splitter=RandomSplitter(.2, seed=0)).dataloaders(sentences(), bs=8, num_workers=0).train
    return [describe_tfms(dl, imgs),describe_tfms(t),describe_tfms(table_dls(table()).train)]

def test_other_process(store, imgs, tmp_path):
    "The fingerprint is the same in another process; spawned workers find the same items"
    (tmp_path/'other.py').write_text(textwrap.dedent(code.format(tests=str(Path(__file__).parent), imgs=str(imgs), store=str(store.path))))
    r = subprocess.run([sys.executable, str(tmp_path/'other.py')], capture_output=True, text=True, env={**os.environ, 'PYTHONHASHSEED':'7'})
    assert r.returncode==0, r.stderr[-3000:]
    said,n = [o for o in r.stdout.splitlines() if o.startswith('[[') or o.isdigit()]
    assert eval(said)==fingerprints(imgs) and 'Numericalize' in said and n=='48'

@pytest.mark.parametrize('num_workers', [0,2])
def test_views(imgs, tmp_path, num_workers):
    "Augmented versions come back with their answers, also where another batch is looked at in the middle of an epoch"
    make = lambda: image_dls(imgs, block=dict(item_tfms=RandomResizedCrop(sz, min_scale=.3), batch_tfms=[*aug_transforms(),Normalize.from_stats([.3],[.3])]), num_workers=num_workers)
    st = precompute(Oracle(), make(), tmp_path/'s', views=3)
    dls,xs = st.attach(make()),[]
    for _ in range(3):
        for i,b in enumerate(dls.train):
            assert right(b[-1], b[0])
            if i==0:
                o = dls.train.one_batch(); assert right(o[-1], o[0])
        xs.append(b[0])
    learn,check = learner(dls),Check()
    iter_fit(learn, 'fit', 2, cbs=[KD(),check]); assert check.n==96
    learn,check = learner(make()),Check()
    iter_fit(learn, 'fit', 2, cbs=[KD(st),check]); assert check.n==96
