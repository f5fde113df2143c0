"Targets for small data: each row is what the teachers of that setting answer"
import pytest
from fastai.tabular.all import *
from fastai.vision.all import *
from fastkd.all import *
from fastkd.test_utils import *
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

dls = digits_dls(40, bs=16)
x = torch.stack([o[0] for o in dls.train_ds]).as_subclass(Tensor)
n_steps = dict(lr=1e-2, bar=noop, dtype='float32')
def rows(store, ds): return torch.stack([store[o] for o in ds.items])
def close(a, b): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

class Maker:
    "Makes teachers, and keeps them; the first one is only looked at"
    def __init__(self, stop=None, f=digits_learner, **kw): self.made,self.stop,self.f,self.kw = [],stop,f,kw
    def __call__(self, dls):
        if self.stop==len(self.made): raise KeyboardInterrupt
        self.made.append(self.f(dls, (4,8), seed=len(self.made), **self.kw))
        return self.made[-1]
    def answers(self, *xb):
        with torch.no_grad(): return [l.model.eval()(*xb) for l in self.made[1:]]

class Copies(Callback):
    "Models at the ends of fits"
    run_valid = False
    def __init__(self): self.models = []
    def after_fit(self): self.models.append(deepcopy(self.learn.model).eval())

class TestRows:
    def test_one(self, tmp_path):
        mk = Maker()
        store = small_data_targets(mk, dls, tmp_path/'s', 2, **n_steps)
        assert len(mk.made)==2 and not hasattr(mk.made[0], 'opt_') and len(store)==639
        close(rows(store, dls.train_ds), mk.answers(x)[0])
        assert store.folds.trained_on.tolist()==store.folds.taught.tolist()==[40] and store.folds.accuracy[0]==pytest.approx(store.accuracy())
        # as if it had been trained by hand
        ref = digits_learner(dls, (4,8), seed=1)
        with ref.no_bar(), ref.no_logging(): ref.fit_one_cycle(2, 1e-2)
        with torch.no_grad(): close(mk.answers(x)[0], ref.model.eval()(x))
    def test_folds(self, tmp_path):
        mk = Maker()
        store = small_data_targets(mk, dls, tmp_path/'s', 1, n_folds=4, **n_steps)
        fold = fold_of(dls.train, 4)
        close(rows(store, dls.train_ds), torch.stack(mk.answers(x))[fold,range(40)])
        assert all(len(l.dls.train_ds)==30 for l in mk.made[1:]) and store.folds.trained_on.tolist()==[30]*4
    def test_snapshots(self, tmp_path):
        mk,cb = Maker(),Copies()
        store = small_data_targets(mk, dls, tmp_path/'s', 4, snapshots=2, cbs=cb, **n_steps)
        with torch.no_grad(): p = torch.stack([m(x).softmax(1) for m in cb.models]).mean(0)
        assert len(cb.models)==2 and (cb.models[0](x)-cb.models[1](x)).abs().max()>1e-2
        close(rows(store, dls.train_ds).softmax(1), p)
        assert len(mk.made[1].recorder.values)==2 # of the last cycle
    def test_versions(self, tmp_path):
        mk,fs = Maker(),[lambda x: x.roll(1, -1), lambda x: x.roll(-1, -2)]
        store = small_data_targets(mk, dls, tmp_path/'s', 1, tta=fs, n_folds=2, **n_steps)
        p = torch.stack([torch.stack(mk.answers(f(x))).softmax(2) for f in (noop,*fs)]).mean(0)
        close(rows(store, dls.train_ds).softmax(1), p[fold_of(dls.train, 2),range(40)])
    def test_random_versions(self, tmp_path):
        "`tta=k` is that of `precompute_targets`"
        o,mk = digits_dls(40, bs=16, batch_tfms=[Rotate(20, p=1.)]),Maker()
        store = small_data_targets(mk, o, tmp_path/'s', 1, tta=3, **n_steps)
        ref = precompute_targets(mk.made[1], o, tmp_path/'r', tta=3, bar=noop, dtype='float32')
        close(rows(store, o.train_ds), rows(ref, o.train_ds))
        assert (rows(store, o.train_ds)-mk.answers(x)[0]).abs().max()>1e-2
        learn = digits_learner(o)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KnowledgeDistillation(store))
    def test_all_at_once(self, tmp_path):
        o,mk = digits_dls(40, bs=16, batch_tfms=[Rotate(20, p=1.)]),Maker()
        store = small_data_targets(mk, o, tmp_path/'s', 2, n_folds=2, snapshots=2, tta=2, kind='dense8', lr=1e-2, bar=noop)
        assert len(mk.made)==3 and len(store)==639 and store.spec['kind']=='dense8' and store.manifest['stale']
    def test_regression(self, tmp_path):
        "The loss function says what the answers are, also those of several models"
        o,mk,cb = digits_dls(40, bs=16, task='center'),Maker(),Copies()
        store = small_data_targets(mk, o, tmp_path/'s', 2, snapshots=2, n_folds=2, cbs=cb, **n_steps)
        xs,fold = torch.stack([b[0] for b in o.train_ds]).as_subclass(Tensor),fold_of(o.train, 2)
        with torch.no_grad(): zs = torch.stack([m(xs) for m in cb.models]).view(2, 2, 40, 2).mean(1)
        assert store.spec['task']=='regress'
        close(rows(store, o.train_ds), zs[fold,range(40)])
    def test_own_loss(self, tmp_path):
        "... that of the Learner, where it is not that of the data"
        o = digits_dls(40, bs=16, task='traits')
        mk = Maker(loss_func=MSELossFlat())
        assert small_data_targets(mk, o, tmp_path/'s', 2, snapshots=2, **n_steps).spec['task']=='regress'
    def test_table(self, tmp_path):
        rng = np.random.RandomState(0)
        df = pd.DataFrame(dict(a=rng.randn(60), b=rng.randn(60)))
        df['y'] = np.where(df.a>0, 'pos', 'neg')
        o = TabularPandas(df, [Normalize], [], ['a','b'], y_names='y', splits=(list(range(40)),list(range(40,60)))).dataloaders(bs=16, num_workers=0)
        mk = Maker(f=lambda dls, w, seed: tabular_learner(dls, layers=[4]))
        store = small_data_targets(mk, o, tmp_path/'s', 2, n_folds=2, snapshots=2, tta=[lambda cat,cont: (cat,cont*1.01)], **n_steps)
        assert len(store)==60 and store.folds.taught.tolist()==[20,20]
        learn = tabular_learner(o, layers=[2])
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KnowledgeDistillation(store))

class TestAgain:
    def test_interrupted(self, tmp_path):
        "Folds that are done are not trained again, a store that was half written is"
        mk,kw = Maker(stop=3),dict(n_folds=3, **n_steps)
        with pytest.raises(KeyboardInterrupt): small_data_targets(mk, dls, tmp_path/'s', 1, **kw)
        parts = sorted(o.name[-1] for o in tmp_path.iterdir())
        assert parts==['0','1'] and not (tmp_path/'s').exists()
        mk2 = Maker()
        store = small_data_targets(mk2, dls, tmp_path/'s', 1, **kw)
        assert len(mk2.made)==2 and [o.name for o in tmp_path.iterdir()]==['s']
        fold,zs = fold_of(dls.train, 3),mk.answers(x)+mk2.answers(x)
        close(rows(store, dls.train_ds), torch.stack(zs)[fold,range(40)])
        assert small_data_targets(Maker(stop=1), dls, tmp_path/'s', 1, **kw).folds.equals(store.folds)
    def test_half_written(self, tmp_path, monkeypatch):
        "The teacher of these rows is gone: they are not mixed with those of another training"
        import fastkd.folds as m
        real = m.precompute_targets
        def stops(teacher, dls, path, *args, **kw):
            real(teacher, DataLoaders(dls.loaders[0]), path, *args, **kw)
            raise KeyboardInterrupt
        monkeypatch.setattr(m, 'precompute_targets', stops)
        with pytest.raises(KeyboardInterrupt): small_data_targets(Maker(), dls, tmp_path/'s', 1, n_folds=2, **n_steps)
        monkeypatch.setattr(m, 'precompute_targets', real)
        mk = Maker(f=lambda dls, w, seed: digits_learner(dls, w, seed=seed+10))
        store = small_data_targets(mk, dls, tmp_path/'s', 1, n_folds=2, **n_steps)
        close(rows(store, dls.train_ds), torch.stack(mk.answers(x))[fold_of(dls.train, 2),range(40)])
    def test_other_settings(self, tmp_path):
        small_data_targets(Maker(), dls, tmp_path/'s', 2, n_folds=2, **n_steps)
        for kw in (dict(n_epoch=4),dict(n_folds=1),dict(snapshots=2),dict(tta=[lambda x: x.flip(-1)]),dict(seed=1),dict(lr=1e-3),dict(fit='fit')):
            with pytest.raises(ValueError, match='are not those of these items'): small_data_targets(Maker(), dls, tmp_path/'s', **{**dict(n_epoch=2, n_folds=2), **n_steps, **kw})
        with pytest.raises(ValueError, match="kind='dense'"): small_data_targets(Maker(), dls, tmp_path/'s', 2, n_folds=2, lr=1e-2, kind='dense8')

class Labels:
    "Tiny images with these labels; '?' is none"
    def __new__(cls, labels, n_valid=2):
        rng,n = np.random.RandomState(0),len(labels)
        items = [[torch.tensor(rng.rand(1,8,8)).float(),None if l=='?' else l] for l in labels]
        return DataBlock(blocks=(TransformBlock(dl_type=MemoryDL), MaybeLabelled(CategoryBlock)), get_x=lambda o: TensorImageBW(o[0]), get_y=ItemGetter(1), splitter=IndexSplitter(range(n-n_valid, n))).dataloaders(items, bs=4, num_workers=0)

class TestFewLabels:
    "Classes with an item or two, folds of one class, items without label"
    def test_one_class(self, tmp_path):
        for f in (small_data_targets,lambda mk,d,p,_,n_folds: out_of_fold(mk, d, p, n_folds)):
            with pytest.raises(ValueError, match="are of the class 'a'"): f(Maker(), Labels('aaaaaaaa'), tmp_path/'s', 1, n_folds=2)
            with pytest.raises(ValueError, match="without fold . the labelled items are of the class 'a' alone"): f(Maker(), Labels('aaabaaaaab'), tmp_path/'s', 1, n_folds=3)
            with pytest.raises(ValueError, match="without fold . the labelled items are of the class 'b' alone"): f(Maker(), Labels('a???b???ab'), tmp_path/'s', 1, n_folds=3)
        assert not [*tmp_path.iterdir()]
        assert len(small_data_targets(Maker(), Labels('aaabaaaaab'), tmp_path/'s', 1, bar=noop))==10
    def test_class_of_one_item(self, tmp_path):
        with pytest.warns(UserWarning, match="of 1 of 3 classes there is one item only \\('c'\\)"): store = small_data_targets(Maker(), Labels('aabbacbbaabc'), tmp_path/'s', 1, n_folds=2, bar=noop)
        assert len(store)==12
    def test_fewer_items_of_a_class_than_folds(self, recwarn, tmp_path):
        "Each teacher sees all classes, wherever that can be"
        o = Labels('aabbccaabb?????bc', 2)
        for seed in range(20):
            fold,lab = fold_of(o.train, 5, seed),np.array(list('aabbccaabb?????'))
            for c in 'abc': assert np.bincount(fold[lab==c], minlength=5).max()-np.bincount(fold[lab==c], minlength=5).min()<=1
            assert np.bincount(fold).tolist()==[3]*5
        mk = Maker()
        store = small_data_targets(mk, o, tmp_path/'s', 1, n_folds=5, bar=noop)
        assert len(mk.made)==6 and len(store)==17 and not [w for w in recwarn if 'one item only' in str(w.message)]
    def test_more_folds_than_items(self, tmp_path):
        with pytest.raises(ValueError, match='from 2 to that of the different training items, 6, got 7'): small_data_targets(Maker(), Labels('aabbabab'), tmp_path/'s', 1, n_folds=7)

class TestRude:
    def test_before_training(self, tmp_path):
        spun = digits_dls(40, bs=16, batch_tfms=[Rotate(20, p=1.)])
        for d,kw,err,msg in ((dls,dict(n_epoch=0),ValueError,'`n_epoch`'),(dls,dict(n_epoch=3, snapshots=2),ValueError,'no multiple of 2'),(dls,dict(n_folds=0),ValueError,'`n_folds`'),(dls,dict(tta=2),ValueError,'have none'),
            (spun,{},ValueError,'never comes back'),(spun,dict(tta=2, views=2),ValueError,'choose one'),(dls,dict(kind='dens'),ValueError,'dens'),(dls,dict(kind='sparse'),ValueError,'T'),(dls,dict(tta='flip'),TypeError,'tfms'),
            (dls,dict(fit='fitt'),ValueError,'`fit`'),(dls,dict(task='digits'),ValueError,'`task`'),(dls,dict(epochs=3),TypeError,'epochs')):
            mk = Maker()
            with pytest.raises(err, match=msg): small_data_targets(mk, d, tmp_path/'s', **{'n_epoch':2, **kw})
            assert len(mk.made)<2 and not [*tmp_path.iterdir()], kw
    def test_makers(self, tmp_path):
        l = digits_learner(dls)
        for o in (l,l.model,None):
            with pytest.raises(TypeError, match='a function that makes'): small_data_targets(o, dls, tmp_path/'s', 1)
        with pytest.raises(TypeError, match='must return a Learner'): small_data_targets(lambda d: l.model, dls, tmp_path/'s', 1)
        for n in (1,2):
            with pytest.raises(ValueError, match='same model twice'): small_data_targets(lambda d: Learner(d, l.model), dls, tmp_path/'s', 1, n_folds=n, bar=noop)
        with pytest.raises(ValueError, match='has all of them'): small_data_targets(lambda d: digits_learner(dls), dls, tmp_path/'s', 1, n_folds=2, bar=noop)
    def test_a_model_trained_on(self, tmp_path):
        "`out_of_fold`: one model, trained further and further, has seen what it teaches"
        m = tiny_cnn((4,8))
        def train(dls):
            learn = Learner(dls, m)
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
            return learn
        with pytest.raises(ValueError, match='had returned before'): out_of_fold(train, dls, tmp_path/'s', 2, bar=noop)
    def test_nothing_is_left_behind(self, tmp_path):
        "Random numbers go on as before, and so does the order of the batches"
        rng = torch.get_rng_state()
        small_data_targets(lambda d: Learner(d, tiny_cnn((4,8))), dls, tmp_path/'s', 1, n_folds=2, bar=noop)
        assert torch.equal(rng, torch.get_rng_state())

def test_snapshots_of_another_scale():
    "A snapshot of a table's net reads rows as that net did, also those of a student whose table is scaled by other rows"
    df = pd.DataFrame(dict(a=np.arange(60.)**2, y=np.where(np.arange(60)%3, 'p', 'n')))
    few,other = [TabularPandas(df, [Normalize], [], ['a'], y_names='y', splits=(list(range(n)),list(range(40,60)))).dataloaders(bs=16, num_workers=0) for n in (20,40)]
    learn,student = tabular_learner(few, layers=[4]),tabular_learner(other, layers=[2])
    with learn.no_bar(), learn.no_logging(): snaps,_ = fit_snapshots(learn, 1, 1, 1e-2)
    xb = other.valid.one_batch()[:2]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        got,ref = [as_teacher(t).bind(student)(*xb) for t in (snaps.teachers[0],learn)]
    close(got, ref)
    assert (got-learn.model.eval()(*xb)).abs().max()>1e-3
