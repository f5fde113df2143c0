"What a second hostile reading found: each of these failed before"
import pytest,torch
from fastai.vision.all import *
from fastkd.all import *
from fastkd.test_utils import *
from copy import deepcopy
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

def fit(learn, n=1, lr=1e-3, **kw):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, **kw)
    return learn
def column(learn, nm='kd_loss'): return fit_table(learn)[nm].iloc[-1]
def still(n): return torch.ones(n)

class TestCounts:
    "Weights of one, and MixUp with lambda 1, change nothing"
    def run(self, loss, w=False, mix=False):
        d,t = digits_dls(256, bs=64).train_ds,tiny_cnn((8,16))
        label = lambda i: str(int(d[i][1])) if i%4==0 or i>=200 else None
        block = DataBlock((TransformBlock(dl_type=MemoryDL),MaybeLabelled(CategoryBlock(vocab=[str(i) for i in range(10)]), weights=w)), get_x=lambda i: d[i][0],
            get_y=(lambda i: (label(i),1.)) if w else label, splitter=IndexSplitter(range(200,256)))
        set_seed(0)
        learn,mu = Learner(block.dataloaders(list(range(256)), bs=40, num_workers=0, shuffle=False), tiny_cnn(), loss_func=LabelledLoss(), opt_func=SGD),MixUp()
        mu.distrib = SimpleNamespace(sample=still)
        set_seed(1)
        return column(fit(learn, 1, 0., cbs=[KnowledgeDistillation(t, loss)]+[mu]*mix))
    @pytest.mark.parametrize('loss', ['kd','dkd','nkd'])
    def test_ones(self, loss):
        set_seed(7)
        plain = self.run(loss)
        set_seed(7)
        assert self.run(loss, w=True)==pytest.approx(plain, rel=1e-4)
        set_seed(7)
        assert self.run(loss, mix=True)==pytest.approx(plain, rel=1e-4)

def test_unfrozen_teacher_trains():
    T = tiny_cnn((8,16)).requires_grad_(False)
    T[-1].requires_grad_(True)
    kd,learn = KnowledgeDistillation(T, teacher_weight=1.),digits_learner(digits_dls(100, bs=50))
    fit(learn, cbs=kd)
    assert T[0][0].weight.grad is None
    T.requires_grad_(True)
    w = T[0][0].weight.detach().clone()
    fit(learn, 2, 1e-2, cbs=kd)
    assert (T[0][0].weight-w).abs().max()>1e-4

@pytest.mark.parametrize('make', [lambda T: T, lambda T: TTATeacher(T, lambda x: x.flip(-1))], ids=['teacher','tta'])
def test_teacher_measured_in_a_fit(make):
    dls,m = digits_dls(100, bs=50),tiny_cnn((8,16)).train()
    def run(*cbs):
        T = make(Teacher(m, vocab=list(dls.vocab)[::-1]))
        class Val(Callback):
            def after_epoch(self): validate_teacher(T, self.learn)
        return column(fit(digits_learner(dls), 2, 0., cbs=[KnowledgeDistillation(T, alpha=1.),*[Val()]*len(cbs)]))
    assert run(1)==pytest.approx(run(), rel=1e-6) and m.training

def test_stores_tell_ensembles_apart():
    from fastkd.targets.precompute import teacher_id
    t,u = tiny_cnn((8,16)),tiny_cnn((4,8))
    a,b = [Ensemble([TTATeacher(t, f),u]) for f in (lambda x: x.flip(-1),lambda x: x.roll(3,-1))]
    assert teacher_id(a)!=teacher_id(b)
    assert teacher_id(Ensemble([Ensemble([t,u],[.9,.1]),u]))!=teacher_id(Ensemble([Ensemble([t,u],[.1,.9]),u]))

def test_members_that_know_others():
    W = [f'c{i}' for i in range(1200)]
    dl = DataLoaders.from_dsets([(torch.randn(4),i) for i in range(40)], [(torch.randn(4),i) for i in range(20)], bs=10)
    dl.vocab = W
    part = lambda x: Teacher(nn.Linear(4,1199), vocab=[o for o in W if o!=x], missing='ignore')
    with pytest.raises(ValueError, match='must know the same'): fit(Learner(dl, nn.Linear(4,1200), loss_func=CrossEntropyLossFlat()), cbs=KnowledgeDistillation([part('c500'),part('c600')]))

def test_corrected_and_missing():
    dls = digits_dls(100, bs=50)
    def run(lf):
        set_seed(3)
        T = Teacher(nn.Sequential(nn.Flatten(), nn.Linear(64,5)), vocab=list(dls.vocab)[:5], missing='ignore')
        return column(fit(digits_learner(dls, loss_func=lf), 1, 0., cbs=KnowledgeDistillation(T, CorrectedLoss('mse_logits'))))
    assert run(CrossEntropyLossFlat())==pytest.approx(run(CrossEntropyLossFlat(ignore_index=255)), rel=1e-6)

def test_copy_has_its_own_learning_teacher():
    dls,T = digits_dls(100, bs=50),tiny_cnn((8,16))
    learn = fit(digits_learner(dls, cbs=KnowledgeDistillation(T, teacher_weight=1.)))
    w = T[0][0].weight.detach().clone()
    new = fit(deepcopy(learn), 1, 1e-2)
    assert torch.equal(T[0][0].weight, w) and not torch.equal(new.knowledge_distillation.teacher.model[0][0].weight, w)
    ema = fit(digits_learner(dls, cbs=KnowledgeDistillation(EMATeacher(.9))))
    fit(deepcopy(ema))

def test_ema_after_a_cancelled_step_of_lr_find():
    class Cancel(Callback):
        def before_step(self):
            if hasattr(self.learn, 'lr_finder'): raise CancelStepException()
    dls,e = digits_dls(100, bs=10),EMATeacher()
    learn = fit(digits_learner(dls, cbs=[KnowledgeDistillation(e),Cancel()]))
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=8, show_plot=False)
    assert fit(learn) and e.k==2*len(dls.train)

def test_ema_before_its_first_fit():
    learn = digits_learner(digits_dls(100, bs=10), cbs=KnowledgeDistillation(EMATeacher()))
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.get_preds()
        learn.lr_find(num_it=12, show_plot=False)
    fit(learn)

def test_mutual_mixup_with_labels():
    ls = [digits_learner(digits_dls(100, bs=50) if i==0 else None, seed=i, cbs=MixUp()) for i in range(1)]
    ls.append(digits_learner(ls[0].dls, seed=1, cbs=MixUp()))
    for l in ls: l.remove_cb(ProgressCallback); l.logger = noop
    assert np.isfinite(mutual_learning(ls, 1, 1e-3, loss='dkd').kd_loss).all()

def test_start_after_the_end():
    learn,t = digits_learner(digits_dls(100, bs=50)),tiny_cnn((8,16))
    with pytest.warns(UserWarning, match='nothing is distilled'): fit(learn, 2, cbs=KnowledgeDistillation(t, start=10))
