"Items without a label, weights, corrected answers: the loss of a batch is the formula computed by hand"
import pickle,subprocess,sys
import pytest,torch
from fastai.vision.all import *
from fastai.tabular.all import *
from fastkd.all import *
from fastkd.test_utils import *
from copy import deepcopy
from sklearn.datasets import load_digits
from conftest import root
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

d = load_digits()
def img(o): return TensorImageBW(tensor(o[0]).float()[None]/16)
def cat(o): return None if o[2] else str(o[1])
def traits(o): return None if o[2] else [t for t,b in (('even',o[1]%2==0),('large',o[1]>4)) if b]
def value(o): return float('nan') if o[2] else [o[1]/9, o[1]/3]
def wt(o): return .5+o[1]%3
def cat_w(o): return cat(o),wt(o)
def value_w(o): return value(o),wt(o)
def traits_w(o): return traits(o),wt(o)
items = [[x,int(y),i%4!=0 and i<96] for i,(x,y) in enumerate(zip(d.images[:160], d.target))]
digits10 = partial(CategoryBlock, vocab=[str(i) for i in range(10)])
def make(get_y=cat, block=digits10, weights=False, bs=32, items=items, dl_type=MemoryDL, **kw):
    return DataBlock(blocks=(TransformBlock(dl_type=dl_type), MaybeLabelled(block, weights)), get_x=img, get_y=get_y, splitter=IndexSplitter(range(96, len(items)))).dataloaders(items, bs=bs, num_workers=0, **kw)
dls = make()
worse = digits_learner(seed=3)
teacher = digits_teacher(epochs=2, widths=(8,16,32))
def learner(dls, **kw):
    c = {'RegressionSetup':2, 'OneHotEncode':2}.get(type(getattr(dls.train_ds.tls[1].tfms.fs[-1], 'tfm', None)).__name__, 10)
    set_seed(0, reproducible=True)
    dls.train.rng = random.Random(0)
    return Learner(dls, tiny_cnn(c=c), **kw)
reg,multi = learner(make(value, RegressionBlock)),learner(make(traits, MultiCategoryBlock))
for o in (reg,multi): nn.init.normal_(o.model[-1].weight, std=2.)

class Seen(Callback):
    "Copies of the first batches, of the models before them, and the losses and gradients"
    order,run_valid = 100,False
    def __init__(self, n=1): self.n,self.seen = n,[]
    def before_batch(self):
        if len(self.seen)>=self.n: return
        self.seen.append(SimpleNamespace(x=self.x.as_subclass(Tensor).clone(), yb=[o.as_subclass(Tensor).clone() for o in self.yb], model=deepcopy(self.learn.model),
            mix=first(cb for cb in self.learn.cbs if isinstance(cb, MixUp)), epoch=self.epoch))
        if self.seen[-1].mix is not None: self.seen[-1].lam,self.seen[-1].yb1 = self.seen[-1].mix.lam.clone(),[o.as_subclass(Tensor).clone() for o in self.seen[-1].mix.yb1]
    def after_backward(self):
        o = self.seen[-1]
        if not hasattr(o, 'loss'): o.loss,o.grad = self.learn.loss_grad.detach().as_subclass(Tensor).clone(),[p.grad.clone() for p in self.learn.model.parameters()]

def seen(dls, t=teacher, *args, n=1, cbs=None, learn=None, **kw):
    learn,cb = learner(dls) if learn is None else learn,Seen(n)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[KnowledgeDistillation(t, *args, **kw), *L(cbs), cb])
    return (cb.seen if n>1 else cb.seen[0]),learn
def asks(t, x):
    with torch.no_grad(): return t.model.eval()(x)
def check(o, f):
    "Loss and gradient of the batch are those of `f(student's prediction)`"
    o.model.train().zero_grad()
    l = f(o.model(o.x))
    l.backward()
    torch.testing.assert_close(o.loss, l.detach(), rtol=1e-4, atol=1e-5)
    for a,p in zip(o.grad, o.model.parameters()): torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-5)
def kl(z, t, T=5.): return T**2*(F.softmax(t/T, 1)*(F.log_softmax(t/T, 1)-F.log_softmax(z/T, 1))).sum(1)
def bkl(z, t, T): return bkd_loss(z, t, T, reduction='none')

class TestEquation:
    def test_classes(self):
        o,_ = seen(dls, alpha=.7)
        y,has,t = o.yb[0],o.yb[0]>=0,asks(teacher, o.x)
        assert 0<has.sum()<32 and set(y[~has].tolist())=={-100}
        check(o, lambda z: .3*F.cross_entropy(z[has], y[has])+.7*kl(z, t).mean())

    def test_several_labels(self):
        o,_ = seen(multi.dls, multi)
        y,t = o.yb[0],asks(multi, o.x)
        has = ~y.isnan().any(1)
        assert 0<has.sum()<32 and set(y[has].unique().tolist())<={0.,1.}
        check(o, lambda z: .5*F.binary_cross_entropy_with_logits(z[has], y[has])+.5*bkd_loss(z, t))

    def test_values(self):
        o,_ = seen(reg.dls, reg)
        y,t = o.yb[0],asks(reg, o.x)
        has = ~y.isnan().any(1)
        assert 0<has.sum()<32
        check(o, lambda z: .5*(z[has]-y[has]).pow(2).mean()+.5*(z-t).pow(2).mean())

    def test_batches_without_labels(self):
        few = make(items=[[x,y,u or (i>7 and i<96)] for i,(x,y,u) in enumerate(items)], bs=8)
        os,learn = seen(few, n=12)
        without = [o for o in os if not (o.yb[0]>=0).any()]
        assert len(without)>5
        for o in os:
            y,has,t = o.yb[0],o.yb[0]>=0,asks(teacher, o.x)
            check(o, lambda z: .5*kl(z, t).mean()+(.5*F.cross_entropy(z[has], y[has]) if has.any() else 0))
        t = fit_table(learn)
        assert t.notna().all().all() and t.labelled.item()==pytest.approx(2/96)
        # and without a teacher, a step of nothing
        learn = learner(few)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        assert all(p.isfinite().all() for p in learn.model.parameters())

    @pytest.mark.parametrize('nm', ['dkd','nkd','wsld','ofa'])
    def test_losses_with_labels(self, nm):
        o,_ = seen(dls, teacher, nm)
        y,has,t = o.yb[0],o.yb[0]>=0,asks(teacher, o.x)
        check(o, lambda z: .5*F.cross_entropy(z[has], y[has])+.5*get_loss(nm)(z[has], t[has], targ=y[has]))

    def test_sum_of_both(self):
        o,_ = seen(dls, teacher, WeightedSum({'kd':'kd', 'dkd':('dkd',2.)}))
        y,has,t = o.yb[0],o.yb[0]>=0,asks(teacher, o.x)
        check(o, lambda z: .5*F.cross_entropy(z[has], y[has])+.5*(kl(z, t).mean()+2*dkd_loss(z[has], t[has], y[has])))

    @pytest.mark.parametrize('lf', [LabelSmoothingCrossEntropyFlat(), FocalLossFlat(), CrossEntropyLossFlat(weight=torch.arange(1.,11)), nn.CrossEntropyLoss(), F.cross_entropy])
    def test_other_loss_functions(self, lf):
        learn = learner(dls, loss_func=LabelledLoss(lf))
        o,_ = seen(dls, learn=learn)
        y,has,t = o.yb[0],o.yb[0]>=0,asks(teacher, o.x)
        check(o, lambda z: .5*lf(z[has], y[has])+.5*kl(z, t).mean())

    def test_terms(self):
        "A term that needs labels is about the items that have one, others about all"
        o,learn = seen(dls, terms=[Term('dkd', weight=2.), Term('at', '1', '1', weight=3., adapter=None)])
        y,has,t = o.yb[0],o.yb[0]>=0,asks(teacher, o.x)
        def f(z):
            with Taps(o.model, '1') as a, Taps(teacher.model, '1') as b, torch.no_grad():
                teacher.model.eval()(o.x)
                with torch.enable_grad(): z = o.model(o.x)
                fs,ft = a.take()[0],b.take()[0]
            return .5*F.cross_entropy(z[has], y[has])+.5*kl(z, t).mean()+2*dkd_loss(z[has], t[has], y[has])+3*at_loss(fs, ft)
        o.model.train()
        l = f(None)
        torch.testing.assert_close(o.loss, l.detach(), rtol=1e-4, atol=1e-5)

    def test_terms_without_labels(self):
        few = make(items=[[x,y,u or (i>7 and i<96)] for i,(x,y,u) in enumerate(items)], bs=8)
        _,learn = seen(few, terms=[Term('nd', '4', '4'), Term('dkd')])
        assert fit_table(learn).notna().all().all() and all(p.isfinite().all() for p in learn.model.parameters())
        with pytest.raises(ValueError, match='by_class=False'): seen(dls, terms=Term(CRDLoss(k=8), '4', '4'))
        seen(dls, terms=Term(CRDLoss(k=8, by_class=False), '4', '4'))
        with pytest.raises(ValueError, match='mix of items'): seen(dls, terms=Term('dkd'), cbs=MixUp())

class TestMixUp:
    "The task by labelled shares, the teacher's answer to every mixed item"
    def task(self, z, o):
        ce = lambda y: F.cross_entropy(z, y, reduction='none')
        (y,*_),(y1,*_) = o.yb,o.yb1
        return (o.lam*ce(y)+(1-o.lam)*ce(y1)).sum()/(y>=0).sum()
    def test_live(self):
        o,_ = seen(dls, cbs=MixUp())
        t = asks(teacher, o.x)
        check(o, lambda z: .5*self.task(z, o)+.5*kl(z, t).mean())
    def test_stored(self, tmp_path):
        store = precompute_targets(teacher, dls, tmp_path/'s', bar=noop, dtype='float32')
        o,learn = seen(dls, store, cbs=MixUp())
        assert set(o.yb[0].tolist())&{-100}
        # whose partners only the answers tell
        ans = torch.stack([store[i] for i in items[:96]])
        x = torch.stack([img(i) for i in items[:96]]).as_subclass(Tensor)
        own = [int(((o.x[i]-o.lam[i]*x).clamp(max=0).abs().flatten(1).sum(1)+((o.x[i]-o.lam[i]*x-(1-o.lam[i])).clamp(min=0)).flatten(1).sum(1)).argmin()) for i in range(32)]
        other = [int((o.x[i]-o.lam[i]*x[own[i]]-(1-o.lam[i])*x).abs().flatten(1).sum(1).argmin()) for i in range(32)]
        lam = o.lam[:,None]
        def f(z):
            p = lam*F.softmax(ans[own]/5, 1)+(1-lam)*F.softmax(ans[other]/5, 1)
            return .5*self.task(z, o)+.5*25*(p*(p.log()-F.log_softmax(z/5, 1))).sum(1).mean()
        check(o, f)
    def test_values(self):
        "A mix has a value if both parts have"
        o,_ = seen(reg.dls, reg, cbs=MixUp())
        y,t = o.yb[0],asks(reg, o.x)
        has = ~y.isnan().any(1)
        assert has.sum()<8
        check(o, lambda z: (.5*(z[has]-y[has]).pow(2).mean() if has.any() else 0)+.5*(z-t).pow(2).mean())
    def test_refused(self):
        for f,b,t in ((traits_w,MultiCategoryBlock,multi),(cat_w,digits10,teacher)):
            with pytest.raises(ValueError, match='leave out one or the other'): seen(make(f, b, True), t, cbs=MixUp())

class TestSources:
    def test_stored(self, tmp_path):
        "Same losses and gradients from a store, from the batch, through a cache, and from the live teacher"
        store = precompute_targets(teacher, dls, tmp_path/'s', bar=noop, dtype='float32')
        assert len(store)==160
        right = [asks(teacher, img(i)[None]).argmax().item()==i[1] for i in items if not i[2]]
        assert store.accuracy()==pytest.approx(np.mean(right))
        live,_ = seen(dls)
        for src,data in ((store,dls),(None,store.attach(dls))):
            o,_ = seen(data, src)
            torch.testing.assert_close(o.loss, live.loss)
            for a,b in zip(o.grad, live.grad): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        o,_ = seen(dls, teacher, cache=tmp_path/'c')
        torch.testing.assert_close(o.loss, live.loss)
        learn = learner(store.attach(dls), loss_func=DistillationLoss(LabelledLoss()))
        cb = Seen()
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=cb)
        torch.testing.assert_close(cb.seen[0].loss, live.loss)
        assert type(pickle.loads(pickle.dumps(learn.loss_func))) is CrossEntropyLossFlat

    def test_few_labels_are_no_bad_teacher(self, tmp_path, recwarn):
        few = make(items=[[x,y,i%12!=0 and i<96] for i,(x,y,_) in enumerate(items)])
        store = precompute_targets(teacher, few, tmp_path/'s', bar=noop)
        seen(few, store)
        assert not [o for o in recwarn if 'near chance' in str(o.message)]

    def test_weights(self, tmp_path):
        wdls = make(cat_w, weights=True)
        store = precompute_targets(teacher, wdls, tmp_path/'s', bar=noop, dtype='float32')
        for src,data in ((teacher,wdls),(store,wdls),(None,store.attach(wdls))):
            o,_ = seen(data, src)
            (y,w),t = o.yb,asks(teacher, o.x)
            has = y>=0
            check(o, lambda z: .5*(w[has]*F.cross_entropy(z[has], y[has], reduction='none')).sum()/w[has].sum()+.5*(w*kl(z, t)).sum()/w.sum())
        # a store of the same data without weights
        seen(dls, store)

class TestWeights:
    wdls = make(cat_w, weights=True)
    @pytest.mark.parametrize('nm', ['dkd','dist','lskd'])
    def test_losses(self, nm):
        o,_ = seen(self.wdls, teacher, nm)
        (y,w),t = o.yb,asks(teacher, o.x)
        has = y>=0
        l = get_loss(nm, ignore_index=-100 if nm=='dkd' else None, reduction='none')
        check(o, lambda z: .5*(w[has]*F.cross_entropy(z[has], y[has], reduction='none')).sum()/w[has].sum()+.5*(w*call_loss(l, z, t, y)).sum()/(w[has] if nm=='dkd' else w).sum())

    def test_values(self):
        o,_ = seen(make(value_w, RegressionBlock, True), reg)
        (y,w),t = o.yb,asks(reg, o.x)
        has = ~y.isnan().any(1)
        check(o, lambda z: .5*(w[has]*(z[has]-y[has]).pow(2).mean(1)).sum()/w[has].sum()+.5*(w*(z-t).pow(2).mean(1)).sum()/w.sum())

    def test_all_labelled(self):
        o,_ = seen(make(cat_w, weights=True, items=[[x,y,False] for x,y,_ in items]))
        (y,w),t = o.yb,asks(teacher, o.x)
        check(o, lambda z: .5*(w*F.cross_entropy(z, y, reduction='none')).sum()/w.sum()+.5*(w*kl(z, t)).sum()/w.sum())

    def test_zero_weights(self):
        o,learn = seen(make(lambda o: (cat(o),0.), weights=True))
        assert o.loss==0 and all(p.isfinite().all() for p in learn.model.parameters())

    def test_everything_else_sees_two(self):
        learn = learner(self.wdls, metrics=accuracy)
        with learn.no_bar(), learn.no_logging():
            learn.lr_find(num_it=6, show_plot=False)
            learn.fit(1, cbs=KnowledgeDistillation(teacher))
            learn.fit(1, cbs=[KnowledgeDistillation(teacher), GradientAccumulation(64)])
            v = learn.validate()
            p,y,l = learn.get_preds(with_loss=True)
            torch.testing.assert_close(l.mean().item(), v[0], rtol=1e-4, atol=1e-5)
            assert l.shape==(64,) and v[1]==pytest.approx((p.argmax(1)==y).float().mean().item())
            assert learn.predict(items[3])[0] in learn.dls.vocab
            learn.show_results(max_n=2)
            with torch.no_grad(): learn.show_results(ds_idx=0, max_n=2)
            assert learn.tta()[0].shape==(64,10) and len(learn.validate(0))==2
            learn.get_preds(ds_idx=0, with_loss=True)
            ClassificationInterpretation.from_learner(learn).confusion_matrix()
            p2,_ = learn.get_preds(dl=learn.dls.test_dl(items[:5]))
            assert p2.shape==(5,10)
            learn.dls.show_batch(max_n=2); learn.dls.valid.show_batch(max_n=2)
        plt.close('all')

    def test_bad(self):
        for w in (-1,float('nan'),'3',None):
            with pytest.raises(ValueError, match='weight of an item'): make(lambda o: (cat(o),w), weights=True)
        with pytest.raises(ValueError, match='a label and a weight'): make(cat, weights=True)
        with pytest.raises(ValueError, match='not with a block that has item transforms'): MaybeLabelled(PointBlock, weights=True)

class TestBlock:
    def test_vocab_and_targets(self):
        "From the labelled items alone"
        its = [[x,y,u or (i<96 and y==7)] for i,(x,y,u) in enumerate(items)]
        its = [o for o in its if o[2] or o[1]!=7]
        n = sum(1 for _ in its)
        o = DataBlock(blocks=(TransformBlock(dl_type=MemoryDL), MaybeLabelled), get_x=img, get_y=cat, splitter=IndexSplitter(range(n-40, n))).dataloaders(its, bs=16, num_workers=0)
        assert list(o.vocab)==[str(i) for i in range(10) if i!=7] and get_c(o)==9
        c = label_counts(o)
        assert c.labelled.tolist()==[sum(not i[2] for i in its[:n-40]),40] and c['items'].tolist()==[n-40,40]

    def test_frame(self):
        "pandas' empty cells"
        df = pd.DataFrame(dict(i=range(160), y=[None if u else str(y) for _,y,u in items], w=1., is_valid=[i>=96 for i in range(160)]))
        def x(r): return img(items[int(r['i'])])
        db = DataBlock(blocks=(TransformBlock(dl_type=MemoryDL), MaybeLabelled(digits10)), get_x=x, get_y=ColReader('y'), splitter=ColSplitter())
        o = db.dataloaders(df, bs=32, num_workers=0)
        assert label_counts(o).equals(label_counts(dls))
        df['y'] = df.y.astype(float)
        db = DataBlock(blocks=(TransformBlock(dl_type=MemoryDL), MaybeLabelled(CategoryBlock(vocab=np.arange(10.)))), get_x=x, get_y=ColReader('y'), splitter=ColSplitter())
        assert label_counts(db.dataloaders(df, bs=32, num_workers=0)).equals(label_counts(dls))
        split = LabelledSplitter(ColReader('y'), RandomSplitter(.25, seed=1))
        t,v = split(df)
        assert sorted([*t,*v])==list(range(160)) and df.y.iloc[list(v)].notna().all() and len(v)==int(.25*df.y.notna().sum())
        o = DataBlock(blocks=(TransformBlock(dl_type=MemoryDL), MaybeLabelled(CategoryBlock(vocab=np.arange(10.)), weights=True)), get_x=x, get_y=ColReader(['y','w']), splitter=ColSplitter()).dataloaders(df, bs=32, num_workers=0)
        assert label_counts(o).weight.tolist()==[24.,64.]
        seen(o, teacher.model)

    def test_table(self):
        rng = np.random.RandomState(0)
        df = pd.DataFrame(dict(a=rng.randn(200), k=rng.choice(list('xyz'), 200)))
        df['y'] = np.where(df.a>0, 'pos', 'neg')
        df.loc[df.index[:150][df.index[:150]%3!=0], 'y'] = np.nan
        sp = list(range(150)),list(range(150,200))
        tab = lambda df,b,y='y': TabularPandas(df, [Categorify,Normalize], ['k'], ['a'], y_names=y, y_block=b, splits=sp).dataloaders(bs=50, num_workers=0)
        o = tab(df, MaybeLabelled(CategoryBlock))
        assert list(o.vocab)==['neg','pos'] and label_counts(o).labelled.tolist()==[50,50]
        t = tabular_learner(o, layers=[8])
        learn,cb = tabular_learner(o, layers=[4]),Seen2()
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[KnowledgeDistillation(t), cb])
        y,has = cb.y.squeeze(1).long(),cb.y.squeeze(1)>=0
        zt = asks2(t, cb.xb)
        z = cb.model.train()(*cb.xb)
        torch.testing.assert_close(cb.loss, (.5*F.cross_entropy(z[has], y[has])+.5*kl(z, zt).mean()).detach(), rtol=1e-4, atol=1e-5)
        df['v'] = df.a.where(df.y.notna())
        o = tab(df, MaybeLabelled(RegressionBlock), 'v')
        learn = tabular_learner(o, layers=[4])
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KnowledgeDistillation(tabular_learner(o, layers=[8])))
        assert fit_table(learn).notna().all().all()
        df.loc[180,'y'] = np.nan
        with pytest.raises(ValueError, match='1 of 50 validation items'): tab(df, MaybeLabelled(CategoryBlock))

    def test_points_and_augmentation(self, tmp_path):
        from PIL import Image as I
        rng = np.random.default_rng(0)
        def im(i): return PILImage(I.fromarray(rng.integers(0, 255, (16,16,3), dtype=np.uint8)))
        its = list(range(24))
        o = DataBlock(blocks=(TransformBlock(type_tfms=im, batch_tfms=IntToFloatTensor), MaybeLabelled(PointBlock)), get_y=lambda i: None if i<12 and i%2 else [[3.,4.],[8.,9.]], splitter=IndexSplitter(range(12,24)),
            batch_tfms=aug_transforms(max_warp=0.)).dataloaders(its, bs=8, num_workers=0)
        x,y = o.train.one_batch()
        assert y.shape==(8,2,2) and get_c(o)==4 and 0<is_labelled(y).sum()<8
        o.show_batch(max_n=4)
        plt.close('all')

    def test_masks(self):
        "Unlabelled images have a mask of `ignore_index`: the task is about labelled pixels, the teacher about all"
        def mask(o):
            m = TensorMask((tensor(o[0]).float()/16*2.99).long())
            if o[2]: m[:] = 255
            elif o[1]%2: m[0] = 255
            return m
        o = DataBlock(blocks=(TransformBlock(dl_type=MemoryDL), TransformBlock(dl_type=MemoryDL)), get_x=img, get_y=mask, splitter=IndexSplitter(range(96,160))).dataloaders(items, bs=16, num_workers=0)
        ce = CrossEntropyLossFlat(axis=1, ignore_index=255)
        t,learn = [Learner(o, tiny_cnn(w, 3, dense=True), loss_func=LabelledLoss(ce)) for w in ((8,16),(4,8))]
        b,_ = seen(o, t, learn=learn)
        y,z = b.yb[0],asks(t, b.x)
        assert (y==255).flatten(1).all(1).any()
        check(b, lambda p: .5*F.cross_entropy(p, y, ignore_index=255)+.5*kl(p, z).mean())
        assert has_label(o.train, 255).tolist()==[not i[2] for i in items[:96]] and label_counts(o, 255).labelled.tolist()==[24,64]
        assert all(is_labelled(b[1], 255).sum()==4 for b in balance(o, .25, ignore_index=255).train)

    def test_text(self):
        from fastai.text.all import TextBlock,text_classifier_learner,AWD_LSTM
        df = pd.DataFrame(dict(text=['a good film','a bad film','what a film','no film at all']*8, y=['pos','neg',None,None]*8, is_valid=[False]*24+[False]*8))
        df.loc[24:,'is_valid'] = df.y[24:].notna()
        o = DataBlock(blocks=(TextBlock.from_df('text', seq_len=8), MaybeLabelled(CategoryBlock)), get_x=ColReader('text'), get_y=ColReader('y'), splitter=ColSplitter()).dataloaders(df, bs=8)
        assert label_counts(o).values.tolist()==[[28,12,16],[4,4,0]]
        cfg = dict(emb_sz=8, n_hid=8, n_layers=1, pad_token=1, bidir=False, output_p=0., hidden_p=0., input_p=0., embed_p=0., weight_p=.1)
        t,learn = [text_classifier_learner(o, AWD_LSTM, pretrained=False, config=cfg) for _ in range(2)]
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KnowledgeDistillation(t))
        assert np.isfinite(fit_table(learn)[['train_loss','task_loss','kd_loss']].values).all()

    def test_show(self):
        o = dls.train.decode_batch(dls.train.one_batch(), max_n=32)
        assert {str(b[1]) for b in o}&{'unlabelled'} and {str(b[1]) for b in o}-{'unlabelled'}<=set(dls.vocab)

    def test_workers(self):
        o = make(dl_type=TfmdDL)
        o = DataLoaders(o.train.new(num_workers=2), o.valid.new(num_workers=2))
        assert sum(is_labelled(b[1]).sum().item() for b in o.train)==24

    def test_bad(self):
        with pytest.raises(ValueError, match='64 of 64 validation|of 64 validation items'): make(items=[[x,y,True if i>=96 else u] for i,(x,y,u) in enumerate(items)])
        with pytest.raises(ValueError, match='no training item has a label'): make(items=[[x,y,i<96] for i,(x,y,_) in enumerate(items)])
        with pytest.raises(TypeError, match='goes around the block of a target'): MaybeLabelled('category')
        with pytest.raises(TypeError, match='goes around the block of a target'): MaybeLabelled(TransformBlock)
        with pytest.raises(ValueError, match='has a part'): make(lambda o: [1.,float('nan')] if o[1]==3 else [1.,2.], RegressionBlock)
        with pytest.raises(ValueError, match='filled with the loss'): make(lambda o: None if o[2] else d.images[0], TransformBlock(type_tfms=PILMask.create))
        with pytest.raises(ValueError, match='LabelledLoss'): seen(dls, learn=learner(dls, loss_func=F.cross_entropy))
        def mine(inp, teach, targ): return (inp-teach).pow(2).mean()
        with pytest.raises(ValueError, match='no `ignore_index`'): seen(dls, teacher, mine)

    def test_export_and_copies(self, tmp_path):
        "What is exported needs no fastkd; a copy of a Learner trains like the original"
        ref = {}
        for nm,o,t in (('cat',dls,teacher),('w',make(get_label_w, weights=True),teacher),('multi',multi.dls,multi),('reg',reg.dls,reg)):
            learn = learner(o)
            with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KnowledgeDistillation(t))
            c = deepcopy(learn)
            for l in (learn,c):
                set_seed(0); l.dls.train.rng = random.Random(0)
            with learn.no_bar(), c.no_bar(), learn.no_logging(), c.no_logging():
                learn.fit(1); c.fit(1)
            assert isinstance(c.loss_func, LabelledLoss) and torch.equal(*[torch.cat([p.flatten() for p in l.model.parameters()]) for l in (learn,c)])
            learn.path = tmp_path
            data = pickle.dumps((learn.dls.new_empty().train_ds.tls[1].tfms, learn.loss_func, learn.dls.train.after_batch))
            assert b'fastkd' not in data, nm

class Seen2(Callback):
    order,run_valid = 100,False
    def before_batch(self):
        if not self.iter: self.xb,self.y,self.model = [x.clone() for x in self.learn.xb],self.learn.yb[0].clone(),deepcopy(self.learn.model)
    def after_loss(self):
        if not self.iter: self.loss = self.learn.loss_grad.detach().as_subclass(Tensor).clone()
def asks2(t, xb):
    with torch.no_grad(): return t.model.eval()(*xb)
def get_label_w(o): return cat(o),wt(o)

def test_export_without_fastkd(tmp_path):
    "In a process that cannot import it"
    script = r'''
import sys,warnings
warnings.filterwarnings('ignore')
class Block:
    def find_spec(self, name, *args):
        if name.split('.')[0] in ('fastkd',): raise ImportError('fastkd is not installed here')
sys.meta_path.insert(0, Block())
from fastai.vision.all import *
def x(i): return TensorImageBW(torch.full((1,8,8), float(i)/64))
def y(i): return str(i%3),1.
learn = load_learner('s.pkl')
assert type(learn.loss_func).__name__=='CrossEntropyLossFlat'
with learn.no_bar(): print(learn.predict(5)[2].tolist(), learn.get_preds(dl=learn.dls.test_dl([1,2,3]))[0].sum().item())
'''
    make_it = r'''
import sys,warnings
warnings.filterwarnings('ignore')
from fastai.vision.all import *
from fastkd.all import *
def x(i): return TensorImageBW(torch.full((1,8,8), float(i)/64))
def y(i): return (None if i<32 and i%2 else str(i%3)),1.
dls = DataBlock(blocks=(TransformBlock, MaybeLabelled(CategoryBlock, weights=True)), get_x=x, get_y=y, splitter=IndexSplitter(range(32,64))).dataloaders(list(range(64)), bs=8, num_workers=0)
learn,t = [Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(64,3))) for _ in range(2)]
with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KnowledgeDistillation(t))
learn.path = Path('.')
learn.export('s.pkl')
with learn.no_bar(): print(learn.predict(5)[2].tolist(), learn.get_preds(dl=learn.dls.test_dl([1,2,3]))[0].sum().item())
'''
    env = {**os.environ, 'PYTHONPATH':str(root), 'OMP_NUM_THREADS':'1'}
    outs = [subprocess.run([sys.executable, '-c', s], cwd=tmp_path, env=env, capture_output=True, text=True) for s in (make_it,script)]
    assert all(o.returncode==0 for o in outs), [o.stderr[-2000:] for o in outs]
    assert outs[0].stdout.splitlines()[-1]==outs[1].stdout.splitlines()[-1]

class TestBalance:
    def test_batches(self, tmp_path):
        half = balance(dls, .5)
        bs = list(half.train)
        assert len(bs)==len(half.train)==5 and all((b[1]>=0).sum()==16 for b in bs)
        assert len(half.train.get_idxs())==72+5*16
        # each unlabelled image once
        x = torch.cat([b[0][b[1]<0] for b in bs])
        assert len(x)==72 and len(torch.unique(x.flatten(1), dim=0))==len(torch.unique(torch.stack([img(i) for i in items if i[2]]).flatten(1), dim=0))
        store = precompute_targets(teacher, half, tmp_path/'s', bar=noop, dtype='float32')
        assert len(store)==160
        a,_ = seen(balance(dls, .5))
        b,learn = seen(balance(dls, .5), store)
        torch.testing.assert_close(a.loss, b.loss)
        assert (b.yb[0]>=0).sum()==16 and fit_table(learn).labelled.item()==pytest.approx(80/152)
        pickle.dumps(learn.dls.new_empty())

    def test_share(self):
        for sh,bs,k in ((.1,32,3),(.01,8,1),(.99,8,7)): assert all((b[1]>=0).sum()==k for b in balance(make(bs=bs), sh).train)

class TestCorrected:
    y = lambda self, o: o.yb[0]
    def swapped(self, t, y):
        t = t.clone()
        for z,k in zip(t, y):
            if k>=0:
                i = z.argmax().item()
                z[i],z[k] = z[k].item(),z[i].item()
        return t
    def test_live(self):
        o,_ = seen(dls, worse, CorrectedLoss())
        y,has,t = o.yb[0],o.yb[0]>=0,asks(worse, o.x)
        assert (t.argmax(1)!=y)[has].any()
        check(o, lambda z: .5*F.cross_entropy(z[has], y[has])+.5*kl(z, self.swapped(t, y)).mean())
    def test_stored(self, tmp_path):
        full = digits_dls(64, bs=32)
        store = precompute_targets(teacher, full, tmp_path/'s', bar=noop, dtype='float32')
        for src in (teacher,store):
            learn = digits_learner(full)
            o,_ = seen(full, src, CorrectedLoss('kd', 'mix', weight=.6), learn=learn)
            y,t = o.yb[0],asks(teacher, o.x)
            p = F.softmax(t/5, 1)
            p = torch.where((t.argmax(1)!=y)[:,None], .4*p+.6*F.one_hot(y, 10), p)
            check(o, lambda z: .5*F.cross_entropy(z, y)+.5*25*(p*(p.log()-F.log_softmax(z/5, 1))).sum(1).mean())
        sparse = precompute_targets(teacher, full, tmp_path/'k', kind='sparse', T=4., k=4, bar=noop)
        with pytest.raises(TypeError, match="kind='dense'"): seen(full, sparse, CorrectedLoss(), learn=digits_learner(full))
    def test_mixup(self):
        full = digits_dls(64, bs=32)
        o,_ = seen(full, teacher, CorrectedLoss(), learn=digits_learner(full), cbs=MixUp())
        t = asks(teacher, o.x)
        ce = lambda z,y: F.cross_entropy(z, y, reduction='none')
        f = lambda z: (.5*(o.lam*ce(z, o.yb[0])+(1-o.lam)*ce(z, o.yb1[0]))+.5*(o.lam*kl(z, self.swapped(t, o.yb[0]))+(1-o.lam)*kl(z, self.swapped(t, o.yb1[0])))).mean()
        check(o, f)
    def test_binary(self):
        o,_ = seen(multi.dls, multi, CorrectedLoss('bkd'))
        y,t = o.yb[0],asks(multi, o.x)
        has = ~y.isnan().any(1)
        c = torch.where(((t>0)!=(y>.5))&~y.isnan(), -t, t)
        assert (c!=t).any()
        check(o, lambda z: .5*F.binary_cross_entropy_with_logits(z[has], y[has])+.5*bkd_loss(z, c))

class TestRude:
    def test_again_and_interrupted(self):
        class Stop(Callback):
            order,run_valid = 100,False
            def after_loss(self):
                if self.iter==1: raise KeyboardInterrupt
        learn = learner(dls, cbs=KnowledgeDistillation(teacher))
        with learn.no_bar(), learn.no_logging():
            for cb in (MixUp(),None):
                with pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[Stop(), *L(cb)])
                assert isinstance(plain_loss(learn.loss_func), LabelledLoss)
                learn.loss_func = plain_loss(learn.loss_func)
                learn.fit(1)
        assert [m.name for m in learn.metrics]==[]

    def test_precision(self):
        learn = learner(dls).to_bf16()
        _,learn = seen(dls, learn=learn)
        assert fit_table(learn).notna().all().all()

    def test_no_labels_at_all(self):
        "As before: batches of `x` alone"
        only = DataLoaders(TfmdDL(Datasets([o[0] for o in items[:64]], [[lambda o: img([o])]]), bs=32, num_workers=0), dls.valid)
        set_seed(0)
        learn = Learner(only, tiny_cnn(), loss_func=CrossEntropyLossFlat())
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KnowledgeDistillation(teacher, alpha=1.))
        assert np.isfinite(fit_table(learn).kd_loss.item())

    def test_frozen_teacher_and_co_trained(self):
        t = digits_learner(dls, widths=(8,16,32))
        _,learn = seen(dls, t, teacher_weight=1.)
        assert fit_table(learn).notna().all().all()
