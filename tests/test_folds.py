"Out-of-fold teachers: no item is taught by one that has seen it"
import pytest,torch
from fastai.vision.all import *
from fastai.tabular.all import *
from fastkd.all import *
from fastkd.test_utils import *
from sklearn.datasets import load_digits
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

dls = digits_dls(60, bs=16)
x = torch.stack([o[0] for o in dls.train_ds]).as_subclass(Tensor)
xv = torch.stack([o[0] for o in dls.valid_ds]).as_subclass(Tensor)

class Maker:
    "Trains teachers, and keeps them and what they have seen"
    def __init__(self, stop=None, **kw): self.made,self.stop,self.kw = [],stop,kw
    def __call__(self, dls):
        if self.stop==len(self.made): raise KeyboardInterrupt
        learn = digits_learner(dls, widths=(8,16), seed=len(self.made), **self.kw)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
        self.made.append(learn)
        return learn
    def logits(self, x):
        with torch.no_grad(): return torch.stack([t.model.eval()(x) for t in self.made])
def rows(store, ds): return torch.stack([store[o] for o in ds.items])
def close(a, b, **kw): torch.testing.assert_close(a, b, **{'rtol':1e-4, 'atol':1e-4, **kw})

@pytest.fixture(scope='module')
def done(tmp_path_factory):
    mk,path = Maker(),tmp_path_factory.mktemp('f')/'s'
    return mk,path,out_of_fold(mk, dls, path, 4, dtype='float32', bar=noop)

class TestRows:
    def test_training_items(self, done):
        "Each row is the answer of the one teacher whose training items do not hold it"
        mk,_,store = done
        fold,got,zs = fold_of(dls.train, 4),rows(store, dls.train_ds),mk.logits(x)
        assert len(mk.made)==4 and len(store)==60+599
        for i,o in enumerate(dls.train_ds.items):
            unseen = [k for k,t in enumerate(mk.made) if not any(p is o for p in t.dls.train_ds.items)]
            assert unseen==[fold[i]]
            close(got[i], zs[unseen[0],i])
        assert (zs-got).abs().amax(2).gt(1e-3).sum().item()==3*60

    def test_validation_items(self, done):
        mk,_,store = done
        close(F.softmax(rows(store, dls.valid_ds), 1), F.softmax(mk.logits(xv), 2).mean(0))

    def test_table(self, done):
        mk,_,store = done
        fold,y = fold_of(dls.train, 4),tensor([o[1] for o in dls.train_ds])
        right = mk.logits(x).argmax(2)[fold,range(60)]==y
        assert store.folds.taught.tolist()==np.bincount(fold).tolist() and (store.folds.taught+store.folds.trained_on==60).all()
        np.testing.assert_allclose(store.folds.accuracy, [right[fold==k].float().mean() for k in range(4)], atol=1e-6)
        assert store.accuracy()==pytest.approx(right.float().mean().item())

    def test_it_teaches(self, done):
        mk,_,store = done
        class Seen(Callback):
            order,run_valid = 100,False
            def after_loss(self):
                if not self.iter: self.o = [o.detach().as_subclass(Tensor).clone() for o in (self.x,self.y,self.learn.pred,self.learn.loss_grad)]
        learn,cb = digits_learner(dls),Seen()
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[KnowledgeDistillation(store, alpha=.7), cb])
        xb,y,z,loss = cb.o
        i = [int((x-o).abs().flatten(1).sum(1).argmin()) for o in xb]
        t = mk.logits(x)[fold_of(dls.train, 4)[i],i]
        close(loss, .3*F.cross_entropy(z, y)+.7*kd_loss(z, t))

    def test_teachers_validate_on_their_fold(self, done):
        mk,_,store = done
        for k,t in enumerate(mk.made):
            with t.no_bar(), t.no_logging(): assert t.validate()[1]==pytest.approx(store.folds.accuracy[k], abs=1e-6)

class TestAgain:
    def test_there_already(self, done):
        mk,path,store = done
        again = out_of_fold(mk, dls, path, 4, dtype='float32', bar=noop)
        assert len(mk.made)==4 and again.folds.equals(store.folds) and sorted(o.name for o in path.parent.iterdir())==['s']

    def test_interrupted(self, tmp_path):
        mk = Maker(stop=2)
        with pytest.raises(KeyboardInterrupt): out_of_fold(mk, dls, tmp_path/'s', 4, dtype='float32', bar=noop)
        assert not (tmp_path/'s').exists()
        mk.stop = None
        store = out_of_fold(mk, dls, tmp_path/'s', 4, dtype='float32', bar=noop)
        assert len(mk.made)==4
        close(rows(store, dls.train_ds), mk.logits(x)[fold_of(dls.train, 4),range(60)])

    def test_same_seed(self, tmp_path):
        def make(dls):
            learn = Learner(dls, tiny_cnn((4,8)))
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
            return learn
        state = torch.get_rng_state()
        a,b,c = [rows(out_of_fold(make, dls, tmp_path/f'{i}', 2, seed=s, bar=noop), dls.train_ds) for i,s in enumerate((0,0,1))]
        assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(state, torch.get_rng_state())

    def test_other_items(self, done, tmp_path):
        mk,path,_ = done
        for kw in (dict(n_folds=3),dict(n_folds=4, seed=1)):
            with pytest.raises(ValueError, match='are not those of these items'): out_of_fold(mk, dls, path, **kw)
        with pytest.raises(ValueError, match='are not those of these items'): out_of_fold(mk, digits_dls(60, bs=16, seed=1), path, 4)
        other = precompute_targets(mk.made[0], dls, tmp_path/'p', bar=noop)
        with pytest.raises(ValueError, match='are not those of these items'): out_of_fold(mk, dls, tmp_path/'p', 4)

class TestFolds:
    def test_same_item_twice(self, tmp_path):
        d = load_digits()
        its = [[o,int(y)] for o,y in zip(d.images[:40], d.target)]
        def img(o): return TensorImageBW(tensor(o[0]).float()[None]/16)
        def y(o): return str(o[1])
        n = len(its)
        two = DataBlock(blocks=(TransformBlock(dl_type=MemoryDL), CategoryBlock), get_x=img, get_y=y, splitter=IndexSplitter(range(2*n, 2*n+20))).dataloaders(its+its+[[o,int(l)] for o,l in zip(d.images[100:120], d.target[100:120])], bs=8, num_workers=0)
        mk = Maker()
        store = out_of_fold(mk, two, tmp_path/'s', 4, dtype='float32', bar=noop)
        xs,got = torch.stack([o[0] for o in two.train_ds]).as_subclass(Tensor),rows(store, two.train_ds)
        zs = mk.logits(xs)
        for i,o in enumerate(two.train_ds.items):
            unseen = [k for k,t in enumerate(mk.made) if not any(p is o for p in t.dls.train_ds.items)]
            assert len(unseen)==1
            close(got[i], zs[unseen[0],i])

    def test_alike(self):
        y = np.array([o[1] for o in dls.train_ds])
        for k in (2,3,5): assert (np.ptp(pd.crosstab(fold_of(dls.train, k), y).to_numpy(), 0)<=1).all()
        assert len(set(fold_of(dls.train, 60)))==60

    def test_unlabelled(self, tmp_path):
        "Items without a label go into all folds, too"
        d = load_digits()
        def img(o): return TensorImageBW(tensor(o[0]).float()[None]/16)
        def y(o): return o[1]
        its = [[o,str(l) if i%3==0 or i>=90 else None] for i,(o,l) in enumerate(zip(d.images[:120], d.target))]
        o = DataBlock(blocks=(TransformBlock(dl_type=MemoryDL), MaybeLabelled(CategoryBlock(vocab=[str(i) for i in range(10)]))), get_x=img, get_y=y, splitter=IndexSplitter(range(90,120))).dataloaders(its, bs=16, num_workers=0)
        fold,has = fold_of(o.train, 3),np.array([i[1] is not None for i in its[:90]])
        assert np.bincount(fold[~has]).tolist()==[20]*3
        mk = Maker()
        store = out_of_fold(mk, o, tmp_path/'s', 3, dtype='float32', bar=noop)
        close(rows(store, o.train_ds), mk.logits(torch.stack([b[0] for b in o.train_ds]).as_subclass(Tensor))[fold,range(90)])
        # which are no part of the teachers' validation sets
        for k,t in enumerate(mk.made):
            assert t.dls.valid.n==(has&(fold==k)).sum()
            with t.no_bar(), t.no_logging(): assert t.validate()[1]==pytest.approx(store.folds.accuracy[k], abs=1e-6)
        learn = digits_learner(o)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KnowledgeDistillation(store, CorrectedLoss()))

    @pytest.mark.parametrize('kw', [dict(kind='dense8'),dict(kind='sparse', T=4., k=4),dict(dtype='float16')])
    def test_kinds(self, kw, tmp_path):
        "Rows are those that `precompute_targets` writes, byte for byte"
        mk = Maker()
        store = out_of_fold(mk, dls, tmp_path/'s', 2, bar=noop, **kw)
        fold = fold_of(dls.train, 2)
        keys = item_keys(dls.train, dls.path)
        got = store.fields(store.rows(keys))
        for k,t in enumerate(mk.made):
            one = precompute_targets(t, dls, tmp_path/f'{k}', bar=noop, **kw)
            ref = one.fields(one.rows(keys))
            for f in ref: assert (got[f][fold==k]==ref[f][fold==k]).all()
        assert len(store)==(60 if kw.get('kind')=='sparse' else 659)
        learn = digits_learner(dls)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KnowledgeDistillation(store, T=4.))

    def test_regression(self, tmp_path):
        o,mk = digits_dls(40, bs=16, task='center'),Maker()
        store = out_of_fold(mk, o, tmp_path/'s', 2, bar=noop)
        xs = torch.stack([b[0] for b in o.train_ds]).as_subclass(Tensor)
        close(rows(store, o.train_ds), mk.logits(xs)[fold_of(o.train, 2),range(40)])
        close(rows(store, o.valid_ds), mk.logits(torch.stack([b[0] for b in o.valid_ds]).as_subclass(Tensor)).mean(0))
        assert store.folds.accuracy.isna().all()

    def test_several_labels(self, tmp_path):
        o,mk = digits_dls(40, bs=16, task='traits'),Maker()
        store = out_of_fold(mk, o, tmp_path/'s', 2, bar=noop, dtype='float32')
        close(torch.sigmoid(rows(store, o.valid_ds)), torch.sigmoid(mk.logits(torch.stack([b[0] for b in o.valid_ds]).as_subclass(Tensor))).mean(0))

    def test_table_data(self, tmp_path):
        rng = np.random.RandomState(0)
        df = pd.DataFrame(dict(a=rng.randn(120), k=rng.choice(list('xyz'), 120)))
        df['y'] = np.where(df.a>0, 'pos', 'neg')
        o = TabularPandas(df, [Categorify,Normalize], ['k'], ['a'], y_names='y', splits=(list(range(80)),list(range(80,120)))).dataloaders(bs=16, num_workers=0)
        made = []
        def make(dls):
            made.append(tabular_learner(dls, layers=[4]))
            return made[-1]
        store = out_of_fold(make, o, tmp_path/'s', 4, bar=noop, dtype='float32')
        fold = fold_of(o.train, 4)
        for k,t in enumerate(made): assert not set(t.dls.train.dataset.items.index)&set(df.index[:80][fold==k]) and len(t.dls.train.dataset)==60
        b = o.train.new(shuffle=False, drop_last=False, bs=80).one_batch()
        with torch.no_grad(): zs = torch.stack([t.model.eval()(*b[:2]) for t in made])
        close(torch.stack([store[i] for i in o.train.dataset.items.index]), zs[fold,range(80)])
        learn = tabular_learner(o, layers=[2])
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KnowledgeDistillation(store))

    def test_augmented(self, tmp_path):
        "Random transforms: views are recorded by the teacher of the fold, or refused"
        class Flip(RandTransform):
            def encodes(self, o:TensorImageBW): return o.flip(-1)
        d = load_digits()
        def img(o): return TensorImageBW(tensor(o[0]).float()[None]/16)
        o = DataBlock(blocks=(TransformBlock, CategoryBlock(vocab=list(range(10)))), get_x=img, get_y=lambda o: o[1], item_tfms=Flip(p=.5), splitter=IndexSplitter(range(40,60))).dataloaders([[i,int(l)] for i,l in zip(d.images[:60], d.target)], bs=8, num_workers=0)
        mk = Maker()
        with pytest.raises(ValueError, match='random transforms'): out_of_fold(mk, o, tmp_path/'r', 2, bar=noop)
        store = out_of_fold(mk, o, tmp_path/'s', 2, views=2, bar=noop)
        assert store.views==2 and len(store)==40
        learn = digits_learner(o)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=KnowledgeDistillation(store))

class TestRude:
    def test_types(self, tmp_path):
        t = digits_learner(dls)
        for o in (t,t.model,None,[t]):
            with pytest.raises(TypeError, match='is a function that trains'): out_of_fold(o, dls, tmp_path/'s')
        for k in (1,0,61,2.5,True,None):
            with pytest.raises(ValueError, match='`n_folds` must be'): out_of_fold(Maker(), dls, tmp_path/'s', k)
        with pytest.raises(TypeError): out_of_fold(Maker(), dls, tmp_path/'s', knd='dense')
        with pytest.raises(TypeError): out_of_fold(lambda d: 3, dls, tmp_path/'s', bar=noop)
    def test_cheats(self, tmp_path):
        t = digits_learner(dls)
        with pytest.raises(ValueError, match='was trained on 30 of the items'): out_of_fold(lambda d: t, dls, tmp_path/'s', 2, bar=noop)
        with pytest.raises(ValueError, match='same weights'): out_of_fold(lambda d: deepcopy(t.model), dls, tmp_path/'m', 2, bar=noop)
    def test_order_of_its_own(self, tmp_path):
        with pytest.raises(ValueError, match='order of its own'): out_of_fold(Maker(), DataLoaders(dls.train.new(get_idxs=lambda: list(range(60))), dls.valid), tmp_path/'s', 2, bar=noop)
    def test_small_folds(self, tmp_path):
        "Fewer items than a batch, which fastai would drop"
        o = digits_dls(40, bs=32)
        o = DataLoaders(o.train.new(drop_last=True), o.valid)
        mk = Maker()
        out_of_fold(mk, o, tmp_path/'s', 2, bar=noop)
        assert all(len(t.dls.train)==1 for t in mk.made)
    def test_no_validation_set(self, tmp_path):
        o = DataLoaders(dls.train)
        store = out_of_fold(lambda d: nn.Sequential(nn.Flatten(), nn.Linear(64,10)), o, tmp_path/'s', 2, task='softmax', bar=noop)
        assert len(store)==60
    def test_attached(self, done, tmp_path):
        "DataLoaders that carry other answers already"
        mk,_,store = done
        new = Maker()
        s = out_of_fold(new, store.attach(dls), tmp_path/'s', 2, bar=noop, dtype='float32')
        close(rows(s, dls.train_ds), new.logits(x)[fold_of(dls.train, 2),range(60)])
