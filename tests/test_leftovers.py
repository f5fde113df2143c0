"Small things that were left over: each test failed before"
import pytest
from fastai.vision.all import *
from fastai.tabular.all import *
from fastkd.all import *
from fastkd.test_utils import *
from copy import deepcopy
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]
pytestmark = pytest.mark.filterwarnings('ignore')
KD = KnowledgeDistillation

dls = digits_dls(128)
good = digits_teacher(epochs=2, widths=(8,16))
def fit(learn, n=1, lr=1e-2, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kw)
    return learn
def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.state_dict().values()])

class Between(Callback):
    "Do something after the first epoch"
    run_valid = False
    def __init__(self, f): self.f = f
    def after_train(self):
        if self.epoch==0: self.f(self.learn)

# ---------------------------------------------------------------- in the middle of a fit
reverse = dict(vocab=[str(i) for i in reversed(range(10))])
teachers = dict(aligned=lambda: Teacher(deepcopy(good.model), **reverse), ensemble=lambda: Ensemble([Teacher(deepcopy(good.model), **reverse),Ensemble([deepcopy(good.model)]*2, [1,2])], [3,1]),
    tta=lambda: TTATeacher(Teacher(deepcopy(good.model), **reverse), lambda x: x.roll(1, 3)), training=lambda: Teacher(deepcopy(good.model).train(), **reverse))
@pytest.mark.parametrize('nm', teachers)
def test_precompute_in_a_fit(nm, tmp_path):
    "The teacher at work goes on as if nothing had been stored, and its answers are stored as they are outside of a fit"
    res,stores = [],[]
    for f in (noop, lambda l: stores.append(precompute_targets(t, digits_dls(64), tmp_path/'in', T=None, task='softmax', bar=noop))):
        t = teachers[nm]()
        was = [p.model.training for p in t.parts]
        res.append(fit(digits_learner(dls), 2, cbs=[KD(t),Between(f)]))
        assert [p.model.training for p in t.parts]==was
    assert torch.equal(weights(res[0]), weights(res[1]))
    out = precompute_targets(teachers[nm](), digits_dls(64), tmp_path/'out', task='softmax', bar=noop)
    assert stores[0].manifest['teacher']==out.manifest['teacher'] and len(stores[0])==len(out)
    assert stores[0].accuracy()==out.accuracy()

def test_precompute_keeps_the_precision():
    "A `dtype` for the store alone is forgotten afterwards"
    t = Teacher(good)
    with tempfile.TemporaryDirectory() as d: precompute_targets(t, dls, Path(d)/'a', amp=torch.bfloat16, bar=noop)
    assert t.dtype is None

# ---------------------------------------------------------------- weights of items
def test_distillation_loss_and_weights(tmp_path):
    "It says the way out"
    def make(store=None):
        its = list(range(48))
        x = lambda i: torch.randn(6, generator=torch.Generator().manual_seed(i))
        blocks = [TransformBlock,MaybeLabelled(CategoryBlock(vocab=[0,1,2]), weights=True)]+([] if store is None else [TeacherBlock(store)])
        return DataBlock(blocks, get_x=x, get_y=lambda i: (i%3,1.+i%2), splitter=IndexSplitter(range(32,48)), n_inp=1).dataloaders(its, bs=16, num_workers=0)
    plain = make()
    torch.manual_seed(0)
    store = precompute_targets(nn.Linear(6,3), plain, tmp_path/'s', task='softmax', bar=noop)
    for d in (make(store), plain):
        learn = Learner(d, nn.Linear(6,3), loss_func=DistillationLoss(LabelledLoss()))
        with pytest.raises(TypeError, match='a weight beside their label.*KnowledgeDistillation'): fit(learn)
    # what comes without weights is none of its business
    z,t,y = torch.randn(4,3),torch.randn(4,3),torch.arange(4)%3
    torch.testing.assert_close(DistillationLoss(LabelledLoss())(z, y, t), .5*F.cross_entropy(z, y)+.5*kd_loss(z, t))
    v = torch.randn(4)
    torch.testing.assert_close(DistillationLoss(nn.MSELoss())(v, v+1, v+2), tensor(.5+.5*4))

# ---------------------------------------------------------------- who answered
def test_names_of_functions(tmp_path):
    "What has no name is known by its code"
    def who(**kw): return precompute_targets(Teacher(good, **kw), dls, tmp_path/str(random.random()), bar=noop).manifest['teacher']['hash']
    def shift(n): return lambda x: x.roll(n, 3)
    fs = [None, lambda x: x.roll(1, 3), lambda x: x.flip(3), shift(1), shift(2), partial(torch.roll, shifts=1, dims=3), partial(torch.roll, shifts=2, dims=3), torch.neg]
    hs = [who(input_tfm=f) for f in fs]
    assert len(set(hs))==len(fs)
    assert who(input_tfm=shift(2))==hs[4] and who(input_tfm=torch.neg)==hs[-1]
    assert who(output=lambda o: o*2)!=who(output=lambda o: o*3)
    precompute_targets(Teacher(good, input_tfm=fs[1]), dls, tmp_path/'s', bar=noop)
    with pytest.raises(ValueError, match='teacher'): precompute_targets(Teacher(good, input_tfm=fs[2]), dls, tmp_path/'s', bar=noop)

# ---------------------------------------------------------------- tables
def test_fewer_code_columns_without_names():
    "Codes that no `Categorify` made are numbers: the teacher's columns are picked by name"
    df = pd.DataFrame(dict(a=np.arange(40)%3, b=np.arange(40)%4, c=np.arange(40)%5, x=np.arange(40.), y=np.arange(40)/40))
    def table(cats): return TabularPandas(df, cat_names=cats, cont_names=['x'], y_names='y', y_block=RegressionBlock(), splits=RandomSplitter(seed=0)(range_of(df))).dataloaders(bs=16)
    class Net(nn.Module):
        def __init__(self, n): super().__init__(); self.n,self.e,self.l = n,nn.Embedding(5, 3),nn.Linear(n*3+1, 1)
        def forward(self, cat, cont): return self.l(torch.cat([self.e(cat.long()).flatten(1),cont.float()], 1))
    torch.manual_seed(0)
    t,seen = Learner(table(['a','c']), Net(2), loss_func=MSELossFlat()),[]
    class Spy(Callback):
        order,run_valid = KD.order+1,False
        def after_loss(self): seen.append(([o.clone() for o in self.xb],self.y.clone(),self.pred.detach().clone(),self.learn.loss.item()))
    fit(Learner(table(['a','b','c']), Net(3), loss_func=MSELossFlat()), cbs=[KD(t), Spy()])
    for (cat,cont),y,z,loss in seen:
        with torch.no_grad(): q = t.model.eval()(cat[:,[0,2]], cont)
        assert loss==pytest.approx((.5*F.mse_loss(z, y)+.5*F.mse_loss(z, q)).item(), rel=1e-5)
    assert len(seen)==2
    with pytest.raises(ValueError, match=r"needs the categorical columns \['c'\]"): fit(Learner(table(['a','b']), Net(2), loss_func=MSELossFlat()), cbs=KD(t))

# ---------------------------------------------------------------- a teacher that lacks classes
def test_validate_teacher_without_all_classes():
    "There is no metric of answers that lack a class; the teacher stays as it was"
    torch.manual_seed(0)
    t = Teacher(tiny_cnn((4,8), 7), vocab=[str(i) for i in range(7)], missing='ignore')
    was = dict(vars(t))
    with pytest.raises(ValueError, match='does not know all classes of the validation set'): validate_teacher(t, digits_learner(dls))
    assert vars(t)==was
    other = digits_learner(digits_dls(64))
    class InFit(Callback):
        run_valid = False
        def after_train(self):
            with pytest.raises(ValueError, match='does not know all classes'): validate_teacher(t, other)
    res = [fit(digits_learner(dls), 2, cbs=[KD(t),*cbs]) for cbs in ([],[InFit()])]
    assert torch.equal(weights(res[0]), weights(res[1]))

# ---------------------------------------------------------------- memory format
def test_channels_last_is_given_back():
    m = deepcopy(good.model)
    is_cl = lambda: m[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    seen = []
    class See(Callback):
        run_valid = False
        def after_loss(self): seen.append(is_cl())
    fit(digits_learner(dls), cbs=[KD(Teacher(m, channels_last=True)),See()])
    assert seen and all(seen) and not is_cl() and m[1][0].weight.is_contiguous()
    # a student in this format takes its teacher along, and gives it back, too
    learn = digits_learner(dls)
    learn.to_channelslast(use_amp=False)
    seen.clear()
    fit(learn, cbs=[KD(Teacher(m)),See()])
    assert seen and all(seen) and not is_cl()
    # whose model was in it stays in it
    m.to(memory_format=torch.channels_last)
    fit(digits_learner(dls), cbs=KD(Teacher(m, channels_last=True)))
    assert is_cl()

# ---------------------------------------------------------------- lr_find
def test_lr_find_without_labels(tmp_path):
    x = torch.randn(64, 8)
    un = DataLoaders(*(DataLoader([(o,) for o in x], bs=16, num_workers=0) for _ in range(2)))
    torch.manual_seed(0)
    learn = Learner(un, nn.Linear(8,3), loss_func=CrossEntropyLossFlat(), path=tmp_path, cbs=KD(nn.Linear(8,3), alpha=1.))
    was = weights(learn)
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='`lr_find` measures.*no labels'): learn.lr_find(show_plot=False)
    assert torch.equal(weights(learn), was)
    # nothing of it is left
    fit(learn)
    assert not torch.equal(weights(learn), was)


def test_cost_table_keeps_modes():
    "It left the models in eval mode"
    from fastkd.test_utils import cost_table,digits_dls,digits_learner
    s,t = [digits_learner(digits_dls(60)) for _ in range(2)]
    s.model.train(); t.model.eval()
    cost_table(s, teacher=t)
    assert [m.training for m in s.model.modules()]==[True]*len(list(s.model.modules())) and not t.model.training
