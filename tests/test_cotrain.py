"A teacher that learns beside the student: its weights are those of plain training, the student's those of plain distillation"
import pytest,torch
from fastai.vision.all import *
from fastkd.all import *
from fastkd.test_utils import *
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

dls = digits_dls(64, bs=16)
def big(seed=0, **kw): return digits_learner(dls, (8,16,32), seed=seed, **kw)
def quiet(learn, f='fit', *args, **kw):
    with learn.no_bar(), learn.no_logging(): getattr(learn, f)(*args, **kw)
    return learn
def weights(m): return torch.cat([o.flatten().float() for o in m.state_dict().values()])
def same(a, b, tol=1e-6): return (weights(a)-weights(b)).abs().max().item()<=tol
def pair(opt=Adam, **kw):
    "Student and teacher, made so that the student's batches come as those of a Learner alone"
    t,s = big(opt_func=opt),digits_learner(dls, seed=1, opt_func=opt)
    return s,t,KnowledgeDistillation(t, **{'teacher_weight':1., **kw})
def alone(f='fit_one_cycle', *args, opt=Adam, cbs=None, **kw):
    t = big(opt_func=opt)
    dls.train.rng = random.Random(1)
    return quiet(t, f, *args, cbs=cbs, **kw)

@pytest.mark.parametrize('f,args', [('fit_one_cycle',(3,1e-2)), ('fit',(2,1e-2)), ('fit_flat_cos',(2,1e-2))])
def test_teacher_is_as_if_trained_alone(f, args):
    s,t,kd = pair()
    quiet(s, f, *args, cbs=kd)
    assert same(t.model, alone(f, *args).model)

@pytest.mark.parametrize('cbs', [lambda: GradientAccumulation(32), lambda: MixUp(.4)])
def test_with_other_callbacks(cbs):
    s,t,kd = pair()
    set_seed(3)
    quiet(s, 'fit', 2, 1e-2, cbs=[cbs(),kd])
    ref = big()
    dls.train.rng = random.Random(1)
    set_seed(3)
    quiet(ref, 'fit', 2, 1e-2, cbs=cbs())
    assert same(t.model, ref.model)

def test_weight_scales_the_teachers_gradient_only():
    s,t,kd = pair(SGD, teacher_weight=.25)
    quiet(s, 'fit', 1, .4, cbs=kd, wd=0)
    assert same(t.model, alone('fit', 1, .1, opt=SGD, wd=0).model, 1e-5)

def test_student_learns_from_the_teacher_of_the_moment():
    "A plain loop, in which the teacher answers before its own step"
    s,t,kd = pair(SGD, T=2., alpha=.3)
    a,b = deepcopy(s.model),deepcopy(t.model)
    dls.train.rng = random.Random(1)
    quiet(s, 'fit', 2, .05, cbs=kd, wd=0)
    dls.train.rng = random.Random(1)
    for m in (a,b): m.train()
    for _ in range(2):
        for x,y in dls.train:
            x,y = x.as_subclass(Tensor),y.as_subclass(Tensor)
            z,v = a(x),b(x)
            kl = F.kl_div((z/2).log_softmax(1), (v.detach()/2).softmax(1), reduction='batchmean')*4
            gs = [torch.autograd.grad(l, m.parameters()) for l,m in ((.7*F.cross_entropy(z, y)+.3*kl, a),(F.cross_entropy(v, y), b))]
            with torch.no_grad():
                for m,g in zip((a,b), gs):
                    for p,d in zip(m.parameters(), g): p -= .05*d
    assert same(s.model, a, 1e-5) and same(t.model, b, 1e-5)

def test_loss_by_hand():
    s,t,kd = pair(T=2., alpha=.3, teacher_weight=.7)
    class Seen(Callback):
        order = KnowledgeDistillation.order+1
        def before_batch(self): self.t = deepcopy(t.model).train()
        def after_loss(self):
            if not self.training: return
            with torch.no_grad(): v = self.t(self.x.as_subclass(Tensor))
            z,y = self.learn.pred.detach().as_subclass(Tensor),self.y.as_subclass(Tensor)
            kl = F.kl_div((z/2).log_softmax(1), (v/2).softmax(1), reduction='batchmean')*4
            self.hand = .7*F.cross_entropy(z, y)+.3*kl+.7*F.cross_entropy(v, y)
            assert self.learn.loss.item()==pytest.approx(self.hand.item(), abs=1e-5)
            self.n = getattr(self, 'n', 0)+1
    seen = Seen()
    quiet(s, 'fit', 2, 1e-2, cbs=[kd,seen])
    assert seen.n==8

def test_columns():
    s,t,kd = pair(log=True)
    quiet(s, 'fit', 2, 1e-2, cbs=kd)
    row = fit_table(s).iloc[-1]
    with t.no_bar(), t.no_logging(): loss,acc = t.validate()
    assert row.teacher_accuracy==pytest.approx(acc, abs=1e-6)
    assert len(s.metrics)==1 and s.metrics[0].name=='accuracy'
    ref = []
    class Losses(Callback):
        def after_loss(self):
            if self.training: ref.append(self.loss.item())
    alone('fit', 2, 1e-2, cbs=Losses())
    assert row.teacher_loss==pytest.approx(np.mean(ref[4:]), abs=1e-5)

def test_training_metrics():
    s,t,kd = pair()
    s.recorder.train_metrics = True
    quiet(s, 'fit', 1, 1e-2, cbs=kd)
    tbl = pd.DataFrame([list(o) for o in s.recorder.values], columns=list(s.recorder.metric_names[1:-1]))
    assert tbl[['train_teacher_accuracy','valid_teacher_accuracy']].notna().all(axis=None)

def test_window_and_terms():
    "The teacher learns before distillation starts, and beside layer terms"
    s,t,kd = pair(start=1, terms=Term('hint', '2', '2', weight=.1))
    quiet(s, 'fit', 2, 1e-2, cbs=kd)
    assert same(t.model, alone('fit', 2, 1e-2).model)
    tbl = fit_table(s)
    assert np.isnan(tbl.kd_loss[0]) and np.isfinite(tbl.kd_loss[1]) and tbl.teacher_loss.notna().all()

def test_fine_tune_trains_the_whole_teacher():
    s,t,kd = pair()
    s.splitter = lambda m: L(m[:2],m[2:]).map(params)
    before = deepcopy(t.model)
    quiet(s, 'fine_tune', 1, 1e-2, freeze_epochs=1, cbs=kd)
    assert all(not torch.equal(a, b) for a,b in zip(before.parameters(), t.model.parameters()))

def test_modes_and_gradients_stay_clean():
    s,t,kd = pair()
    t.model.eval()
    quiet(s, 'fit', 1, cbs=kd)
    assert not any(m.training for m in t.model.modules()) and all(p.grad is None for p in t.model.parameters())
    t.model.train(); t.model[0].eval()
    modes = [m.training for m in t.model.modules()]
    quiet(s, 'fit', 1, cbs=kd)
    assert [m.training for m in t.model.modules()]==modes

def test_lr_find_leaves_the_teacher():
    s,t,kd = pair()
    before = weights(t.model)
    s.add_cb(kd)
    with s.no_bar(), s.no_logging(): s.lr_find(num_it=12, show_plot=False)
    assert torch.equal(weights(t.model), before)

def test_resume(tmp_path):
    "Two epochs in one go, or one, saved and continued by others"
    s,t,kd = pair()
    quiet(s, 'fit', 2, 1e-2, cbs=kd)
    s1,t1,kd1 = pair()
    s1.path = tmp_path
    quiet(s1, 'fit', 1, 1e-2, cbs=kd1)
    s1.save('half'); kd1.save(tmp_path/'kd')
    rng = dls.train.rng
    s2,t2,kd2 = pair()
    dls.train.rng,s2.path = rng,tmp_path
    s2.load('half', with_opt=True); kd2.load(tmp_path/'kd')
    quiet(s2, 'fit', 1, 1e-2, cbs=kd2)
    assert same(t2.model, t.model) and same(s2.model, s.model)
    with pytest.raises(ValueError, match='with a teacher that learns'): KnowledgeDistillation(t).load(tmp_path/'kd')

def test_export(tmp_path):
    s,t,kd = pair()
    s.add_cb(kd); s.path = tmp_path
    quiet(s, 'fit', 1)
    s.export('s.pkl')
    assert not any('fastkd' in type(o).__module__ for o in (*load_learner(tmp_path/'s.pkl').cbs,*load_learner(tmp_path/'s.pkl').metrics))

def test_bf16():
    s,t,kd = pair()
    quiet(s.to_bf16(), 'fit', 1, 1e-2, cbs=kd)
    assert np.isfinite(fit_table(s).teacher_loss).all() and t.model[0][0].weight.dtype==torch.float32

def test_untrained_teacher_is_no_reason_to_warn():
    s,t,kd = pair()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        quiet(s, 'fit', 1, cbs=kd)

def test_refused(tmp_path):
    s,t,_ = pair()
    store = precompute_targets(t, dls, tmp_path/'store')
    for o in (store,[t,t],None):
        with pytest.raises((ValueError,TypeError), match='one live model'): KnowledgeDistillation(o, teacher_weight=1.)
    with pytest.raises(ValueError, match='one live model'): KnowledgeDistillation(t, teacher_weight=1., cache=tmp_path/'c')
    with pytest.raises(TypeError, match='teacher_weight'): KnowledgeDistillation(t, teacher_weight='1')
    with pytest.raises(ValueError, match='teacher_weight'): KnowledgeDistillation(t, teacher_weight=float('nan'))
    with pytest.raises(ValueError, match='share weights'): quiet(s, 'fit', 1, cbs=KnowledgeDistillation(s.model, teacher_weight=1.))
    with pytest.raises(ValueError, match='frozen'): quiet(s, 'fit', 1, cbs=KnowledgeDistillation(deepcopy(t.model).requires_grad_(False), teacher_weight=1.))
    unlabelled = DataLoaders.from_dblock(DataBlock(blocks=TransformBlock, splitter=IndexSplitter([0])), list(torch.rand(32,1,8,8)), bs=16)
    learn = Learner(unlabelled, tiny_cnn(), loss_func=CrossEntropyLossFlat())
    with pytest.raises(ValueError, match='no labels'): quiet(learn, 'fit', 1, cbs=KnowledgeDistillation(t, alpha=1., teacher_weight=1.))

def test_log_cost():
    s,t,kd = pair(log='cost')
    quiet(s, 'fit', 1, cbs=kd)
    assert 0<fit_table(s).teacher_share.iloc[0]<1
    with pytest.raises(ValueError, match="'cost'"): KnowledgeDistillation(t, log='time')
