"Tables: two inputs, columns of labels, teachers with other columns, trees as teachers"
import warnings
import numpy as np,pandas as pd,pytest,torch
from fastai.tabular.all import *
from fastkd.all import *
from sklearn.ensemble import RandomForestClassifier,RandomForestRegressor
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

rng = np.random.default_rng(0)
n = 120
df = pd.DataFrame(dict(a=rng.normal(size=n), b=rng.normal(2, 3, size=n), k=rng.choice(list('xyz'), n), m=rng.choice(['u','v'], n)))
df['y'] = np.where(df.a+(df.k=='x')>.8, 'high', np.where(df.a>0, 'mid', 'low'))
df['r'],df['p'],df['q'] = (df.a*2+(df.k=='x')).astype('float32'),df.a>0,df.b>0
for o in 'pq': df[o] = df[o].astype(float)
df.loc[::17,'b'] = np.nan
splits = RandomSplitter(seed=0)(range_of(df))

def table(y='y', d=df, cats=('k','m'), conts=('a','b'), procs=(Categorify,FillMissing,Normalize), block=None, bs=16, splits=splits):
    return TabularPandas(d, procs=list(procs), cat_names=list(cats), cont_names=list(conts), y_names=y, y_block=block, splits=splits).dataloaders(bs=bs)
def student(dls, layers=(8,), seed=0, **kw):
    set_seed(seed)
    learn = tabular_learner(dls, layers=list(layers), **kw)
    dls.train.rng = random.Random(seed)
    return learn
def trained(dls, layers=(16,12), epochs=2, **kw):
    learn = student(dls, layers, seed=1, **kw)
    quiet(learn).fit(epochs, 1e-2)
    return learn
def quiet(learn):
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, (ProgressCallback,))])
    learn.logger = noop
    return learn

class Spy(Callback):
    "The batches of training: inputs, labels, what the student said and the loss"
    order,run_valid = 100,False
    def __init__(self): self.seen = []
    def after_loss(self): self.seen.append(SimpleNamespace(xb=tuple(o.clone() for o in self.xb), y=self.yb[0].clone(), z=self.pred.detach().clone(), loss=self.learn.loss_grad.detach().as_subclass(Tensor).clone()))
def fit(learn, kd, n=1, cbs=()):
    spy = Spy()
    quiet(learn).fit(n, 1e-2, cbs=[kd,spy,*L(cbs)])
    return spy.seen
def say(m, xb):
    m.eval()
    with torch.no_grad(): return m(*xb)
def close(a, b, **kw): torch.testing.assert_close(torch.as_tensor(a).float(), torch.as_tensor(b).float(), **{'rtol':1e-4, 'atol':1e-5, **kw})
def kl(z, zt, T=5.): return T**2*(F.softmax(zt/T, 1)*(F.log_softmax(zt/T, 1)-F.log_softmax(z/T, 1))).sum(1).mean()
def ce(z, y): return F.cross_entropy(z, y.flatten().long())
def bkl(z, zt, T=5.):
    p,s = torch.sigmoid(zt/T),torch.sigmoid(z/T)
    return T**2*(p*(p/s).log()+(1-p)*((1-p)/(1-s)).log()).mean()

dls,reg = table(),table('r')
teacher,reg_teacher = trained(dls),trained(reg)

class TestValues:
    "The loss of real batches, by hand from what both said"
    def test_classification(self):
        learn = student(dls, metrics=accuracy)
        for o in fit(learn, KnowledgeDistillation(teacher)):
            assert o.y.shape==(len(o.z),1) and len(o.xb)==2
            close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(teacher.model, o.xb)))

    def test_regression(self):
        learn = student(reg)
        for o in fit(learn, KnowledgeDistillation(reg_teacher, alpha=.3)):
            zt = say(reg_teacher.model, o.xb)
            assert o.z.shape==zt.shape==o.y.shape==(len(o.y),1)
            close(o.loss, .7*(o.z-o.y).pow(2).mean()+.3*(o.z-zt).pow(2).mean())

    def test_regression_with_a_range(self):
        learn = student(reg, y_range=(-8,8))
        for o in fit(learn, KnowledgeDistillation(reg_teacher)):
            assert o.z.abs().max()<=8
            close(o.loss, .5*(o.z-o.y).pow(2).mean()+.5*(o.z-say(reg_teacher.model, o.xb)).pow(2).mean())

    def test_plain_module(self):
        class Plain(nn.Module):
            def __init__(self):
                super().__init__()
                self.emb,self.lin = nn.Embedding(9, 2),nn.Linear(8, 3)
            def forward(self, cat, cont): return self.lin(torch.cat([self.emb(cat).flatten(1),cont], 1))
        torch.manual_seed(0)
        m = Plain().train()
        with warnings.catch_warnings():
            warnings.simplefilter('ignore') # near chance
            seen = fit(student(dls), KnowledgeDistillation(m, T=2.))
        assert m.training and all(p.grad is None for p in m.parameters())
        for o in seen: close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(m, o.xb), 2.))

    @pytest.mark.parametrize('name', ['dkd','nkd'])
    def test_losses_that_use_labels(self, name):
        "Labels of a table are a column"
        for o in fit(student(dls), KnowledgeDistillation(teacher, name)):
            close(o.loss, .5*ce(o.z, o.y)+.5*get_loss(name)(o.z, say(teacher.model, o.xb), targ=o.y.flatten()))

    def test_multi_label(self):
        multi = table(['p','q'], block=MultiCategoryBlock(encoded=True, vocab=['p','q']))
        t = trained(multi)
        for o in fit(student(multi), KnowledgeDistillation(t)):
            close(o.loss, .5*F.binary_cross_entropy_with_logits(o.z, o.y.float())+.5*bkl(o.z, say(t.model, o.xb)))

    def test_ensemble(self):
        two = [teacher,trained(dls, (6,), epochs=1)]
        for o in fit(student(dls), KnowledgeDistillation(two)):
            zt = torch.stack([say(t.model, o.xb).softmax(1) for t in two]).mean(0).log()
            close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, zt))

    def test_terms(self):
        "Layers of both, of other widths"
        learn,kd = student(dls),KnowledgeDistillation(teacher, terms=Term('hint', 'layers.0', 'layers.1'))
        o = fit(learn, kd)[0]
        with Taps(teacher.model, 'layers.1') as taps:
            zt = say(teacher.model, o.xb)
            ft = taps.take()[0]
        assert ft.shape==(16,12) and kd.terms.adapters[0] is not None
        rest = o.loss-.5*ce(o.z, o.y)-.5*kl(o.z, zt)
        assert 0<rest<100

    def test_a_batch_of_one_row(self):
        one = table(splits=(list(range(17)),list(range(17,n))))
        one.train.drop_last = False
        m = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)) # batch norm refuses one row
        class Conts(nn.Module):
            def __init__(self): super().__init__(); self.m = m
            def forward(self, cat, cont): return self.m(cont)
        seen = fit(Learner(one, Conts()), KnowledgeDistillation(teacher.model))
        assert [len(o.z) for o in seen]==[16,1]
        for o in seen: close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(teacher.model, o.xb)))

# 'y' has become 'w', which only the teacher knows; it never saw 'y' and 'z'
other = df[df.k!='z'].assign(k=lambda d: d.k.map(dict(x='x', y='w')), a=lambda d: d.a*3+1).reset_index(drop=True)

class TestOtherTables:
    "A teacher that was trained on other rows, columns and orders"
    def test_scales_and_order(self):
        t = trained(table(d=other, cats=('m','k'), splits=([*range(40)],[*range(40,50)])))
        with pytest.warns(UserWarning, match='does not know 2 of 4 classes'): seen = fit(student(dls), KnowledgeDistillation(t))
        assert t.dls.cat_names==['m','k','b_na'] and t.dls.classes['k']==['#na#','w','x']
        nrm = first(p for p in t.dls.procs if isinstance(p, Normalize))
        for o in seen:
            # the rows as they were, then as the teacher's own data prepare them
            d = dls.decode((*o.xb,o.y)).decode().items
            cat = torch.stack([tensor([list(t.dls.classes[c]).index(v) if v in list(t.dls.classes[c]) else 0 for v in d[c]]) for c in t.dls.cat_names], 1)
            cont = torch.stack([tensor(((d[c]-nrm.means[c])/nrm.stds[c]).to_numpy(float)).float() for c in t.dls.cont_names], 1)
            close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(t.model, (cat,cont))), rtol=1e-3)

    def test_same_data_other_classes(self):
        "Codes of a column that come in another order"
        shuffled = df.assign(k=pd.Categorical(df.k, categories=['z','x','y']))
        t = trained(table(d=shuffled))
        assert list(t.dls.classes['k'])!=list(dls.classes['k'])
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            seen = fit(student(dls), KnowledgeDistillation(t))
        to = {i:list(t.dls.classes['k']).index(c) for i,c in enumerate(dls.classes['k'])}
        for o in seen:
            cat = o.xb[0].clone()
            cat[:,0] = tensor([to[i] for i in o.xb[0][:,0].tolist()])
            close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(t.model, (cat,o.xb[1]))))

    def test_fewer_columns(self):
        "What the teacher does not need is left out; what it needs must be there"
        t = trained(table(cats=['m'], conts=['b']))
        for o in fit(student(dls), KnowledgeDistillation(t)):
            cat,cont = o.xb[0][:,[dls.cat_names.index(c) for c in t.dls.cat_names]],o.xb[1][:,[1]]
            close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(t.model, (cat,cont))))
        with pytest.raises(ValueError, match=r"needs the categorical columns \['k'\]"): fit(student(table(cats=['m'])), KnowledgeDistillation(teacher))
        with pytest.raises(ValueError, match=r"needs the continuous columns \['a'\]"): fit(student(table(conts=['b'])), KnowledgeDistillation(teacher))

    def test_from_an_export(self, tmp_path):
        learn = trained(table(d=df.assign(a=df.a*5-2)))
        learn.path = tmp_path
        learn.export('t.pkl')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            kd = KnowledgeDistillation(tmp_path/'t.pkl')
        seen = fit(student(dls), kd)
        nrm,mine = [first(p for p in d.procs if isinstance(p, Normalize)) for d in (learn.dls,dls)]
        for o in seen:
            cont = o.xb[1].clone()
            cont[:,0] = (cont[:,0]*mine.stds['a']+mine.means['a']-nrm.means['a'])/nrm.stds['a']
            close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(learn.model, (o.xb[0],cont))), rtol=1e-3)

    def test_input_tfm_has_the_say(self):
        t = trained(table(d=df.assign(a=df.a*5-2)))
        for o in fit(student(dls), KnowledgeDistillation(Teacher(t, input_tfm=lambda cat,cont: (cat,cont*2)))):
            close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(t.model, (o.xb[0],o.xb[1]*2))))

        "... not even the columns are compared"
        t = trained(table(cats=['m'], conts=['b']))
        less = table(cats=['k'], conts=['a'])
        pad = lambda cat,cont: (torch.cat([cat[:,:1]*0,cat[:,:1]*0], 1),cont)
        for o in fit(student(less), KnowledgeDistillation(Teacher(t, input_tfm=pad))): close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(t.model, pad(*o.xb))))

    def test_labels_in_another_order(self):
        t = trained(table(block=CategoryBlock(vocab=['mid','low','high'], sort=False)))
        assert list(t.dls.vocab)==['mid','low','high'] and list(dls.vocab)==['high','low','mid']
        with pytest.warns(UserWarning, match='aligned by name'): seen = fit(student(dls), KnowledgeDistillation(t))
        for o in seen: close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(t.model, o.xb)[:,[2,1,0]]))

class TestStored:
    "Answers by row"
    def test_same_as_live(self, tmp_path):
        store = precompute_targets(teacher, dls, tmp_path/'s', dtype='float32', bar=noop)
        a,b = [fit(student(dls), KnowledgeDistillation(t), 2) for t in (teacher,store)]
        for o,p in zip(a, b): close(o.loss, p.loss); assert torch.equal(o.xb[0], p.xb[0])

    def test_other_scale_is_asked_as_live(self, tmp_path):
        t = trained(table(d=df.assign(a=df.a*5-2)))
        store = precompute_targets(t, dls, tmp_path/'s', dtype='float32', bar=noop)
        a,b = [fit(student(dls), KnowledgeDistillation(o)) for o in (t,store)]
        for o,p in zip(a, b): close(o.loss, p.loss)

    def test_regression(self, tmp_path):
        store = precompute_targets(reg_teacher, reg, tmp_path/'s', dtype='float32', bar=noop)
        a,b = [fit(student(reg), KnowledgeDistillation(t)) for t in (reg_teacher,store)]
        for o,p in zip(a, b): close(o.loss, p.loss)

class Forest(nn.Module):
    "A forest of scikit-learn as a teacher: the logarithms of its probabilities"
    def __init__(self, f):
        super().__init__()
        self.f,self.regress = f,not hasattr(f, 'predict_proba')
    def forward(self, cat, cont):
        x = torch.cat([cat.float(),cont], 1).cpu().numpy()
        if self.regress: return tensor(self.f.predict(x)).float()[:,None].to(cont.device)
        return tensor(self.f.predict_proba(x)).clamp_min(1e-3).log().float().to(cont.device)

def xy(dls):
    "The training rows as the batches have them"
    to = dls.train_ds
    return np.concatenate([to.cats.to_numpy(float),to.conts.to_numpy()], 1),to.ys.to_numpy().ravel()

class TestForest:
    def test_live(self):
        m = Forest(RandomForestClassifier(10, random_state=0).fit(*xy(dls)))
        seen = fit(student(dls), KnowledgeDistillation(Teacher(m, vocab=dls.vocab)))
        for o in seen:
            p = tensor(m.f.predict_proba(torch.cat([o.xb[0].float(),o.xb[1]], 1).numpy())).float()
            close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, p.clamp_min(1e-3).log()))
    def test_regression(self):
        m = Forest(RandomForestRegressor(10, random_state=0).fit(*xy(reg)))
        for o in fit(student(reg), KnowledgeDistillation(m)):
            t = tensor(m.f.predict(torch.cat([o.xb[0].float(),o.xb[1]], 1).numpy())).float()[:,None]
            close(o.loss, .5*(o.z-o.y).pow(2).mean()+.5*(o.z-t).pow(2).mean())
    def test_stored(self, tmp_path):
        m = Forest(RandomForestClassifier(10, random_state=0).fit(*xy(dls)))
        store = precompute_targets(m, dls, tmp_path/'s', dtype='float32', bar=noop)
        a,b = [fit(student(dls), KnowledgeDistillation(t)) for t in (m,store)]
        for o,p in zip(a, b): close(o.loss, p.loss)

class TestAfterwards:
    "Predicting with the callback attached is as without it"
    def test_predict(self):
        learn = quiet(student(dls, metrics=accuracy, cbs=KnowledgeDistillation(teacher)))
        learn.fit(1, 1e-2)
        z,y = learn.get_preds()
        want = F.softmax(torch.cat([say(learn.model, b[:2]) for b in dls.valid]), 1)
        close(z, want)
        row,c,p = learn.predict(df.iloc[splits[1][0]])
        close(p, want[0]); assert c==want[0].argmax()
        p,_,loss = learn.get_preds(with_loss=True)
        close(loss, F.cross_entropy(want.log(), y.flatten().long(), reduction='none'))
        v = learn.validate()
        assert len(v)==2
        close(v[0], F.cross_entropy(want.log(), y.flatten().long())); close(v[1], (want.argmax(1)==y.flatten()).float().mean())
        close(learn.get_preds(dl=dls.test_dl(df.iloc[:5].drop(columns='y')))[0], learn.get_preds(dl=dls.test_dl(df.iloc[:5]))[0])
    def test_regression(self):
        learn = quiet(student(reg, cbs=KnowledgeDistillation(reg_teacher)))
        learn.fit(1, 1e-2)
        _,_,p = learn.predict(df.drop(columns='r').iloc[splits[1][0]])
        close(p, say(learn.model, next(iter(reg.valid))[:2])[0])
    def test_fine_tune(self):
        learn = quiet(student(dls))
        spy = Spy()
        learn.fine_tune(1, 1e-2, cbs=[KnowledgeDistillation(teacher),spy])
        assert len(spy.seen)==2*len(dls.train)
        for o in spy.seen: close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(teacher.model, o.xb)))

    def test_weighted_rows(self, tmp_path):
        set_seed(0)
        dl = TabWeightedDL(dls.train_ds, bs=16, wgts=np.linspace(1, 3, len(dls.train_ds)), shuffle=True, drop_last=True)
        both = TabularDataLoaders(dl, dls.valid)
        store = precompute_targets(teacher, both, tmp_path/'s', dtype='float32', bar=noop)
        for t in (teacher,store):
            for o in fit(student(both), KnowledgeDistillation(t)): close(o.loss, .5*ce(o.z, o.y)+.5*kl(o.z, say(teacher.model, o.xb)))

class TestRefused:
    def test_regressor_for_classes(self):
        with pytest.raises(ValueError, match='answers with 1 class'): fit(student(dls), KnowledgeDistillation(Teacher(reg_teacher.model)))
    def test_one_input(self):
        with pytest.raises(ValueError, match='cannot run on the student'): fit(student(dls), KnowledgeDistillation(nn.Linear(2, 3)))
    def test_probabilities(self):
        class Probs(Forest):
            def forward(self, cat, cont): return tensor(self.f.predict_proba(torch.cat([cat.float(),cont], 1).numpy())).float()
        with pytest.raises(ValueError, match='probabilities'): fit(student(dls), KnowledgeDistillation(Probs(RandomForestClassifier(3).fit(*xy(dls)))))
    def test_infinite(self):
        "A forest is sure of itself: the logarithm of 0"
        class Raw(Forest):
            def forward(self, cat, cont): return tensor(np.log(self.f.predict_proba(torch.cat([cat.float(),cont], 1).numpy()))).float()
        with pytest.raises(ValueError, match='not finite'), np.errstate(divide='ignore'): fit(student(dls), KnowledgeDistillation(Raw(RandomForestClassifier(3).fit(*xy(dls)))))
