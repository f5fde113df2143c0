"Trainings that once went wrong in silence, or failed only with a teacher"
import pytest
from fastai.vision.all import *
from fastkd.all import *
from fastkd.test_utils import *
from test_bad_input import Wrap,fit,refused

# fastai brings fastcore's test helpers, which pytest would take for tests
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]
KD = KnowledgeDistillation

@pytest.fixture(scope='module')
def few(): return digits_dls(128)
@pytest.fixture(scope='module')
def teach(): return digits_teacher(epochs=3, widths=(8,16,32))

class Dict(Wrap):
    def forward(self, x): return {'logits':self.f(self.m(x)), 'sum':x.sum((1,2,3))}

class Seen(Callback):
    "The two losses of each step"
    order = KD.order+1
    def before_fit(self): self.parts = []
    def after_loss(self):
        if self.training: self.parts.append((self.learn.xb[0].clone(),self.y.clone(),self.learn.pred.detach().clone(),self.learn.loss.item()))

def test_regression_ensemble_with_own_loss():
    "Values are averaged as values, though the loss function says nothing of the task"
    dls = digits_dls(64, task='center')
    ts = [digits_teacher(dls, epochs=1, seed=i) for i in range(2)]
    learn,seen = digits_learner(dls, loss_func=lambda p,y: F.mse_loss(p, y).sqrt(), metrics=[]),Seen()
    fit(learn, cbs=[KD(ts, 'mse_logits', alpha=.3), seen])
    x,y,pred,loss = seen.parts[0]
    with torch.no_grad(): t = sum(o.model.eval()(x) for o in ts)/2
    assert loss==pytest.approx((.7*F.mse_loss(pred, y).sqrt()+.3*F.mse_loss(pred, t)).item(), rel=1e-5)

def test_dict_teacher_is_aligned(teach):
    "A loss of whole outputs sees classes in the student's order, without a word about `output`"
    dls = digits_dls(64, vocab=[str(i) for i in reversed(range(10))])
    t = Teacher(Dict(teach.model, noop), vocab=teach.dls.vocab)
    learn,seen = Learner(dls, Dict(tiny_cnn(), noop), loss_func=lambda p,y: F.cross_entropy(p['logits'], y)),[]
    class See(Seen):
        def after_loss(self):
            if self.training: seen.append((self.x.clone(),self.y.clone(),self.learn.pred['logits'].detach().clone(),self.learn.loss.item()))
    with pytest.warns(UserWarning, match='aligned by name'): fit(learn, cbs=[KD(t, DictLoss({'logits':KDLoss(T=2.)})), See()])
    x,y,pred,loss = seen[0]
    with torch.no_grad(): z = teach.model.eval()(x).flip(1)
    kl = F.kl_div((pred/2).log_softmax(1), (z/2).log_softmax(1), reduction='batchmean', log_target=True)
    assert loss==pytest.approx((.5*F.cross_entropy(pred, y)+.5*4*kl).item(), rel=1e-5)

def test_dict_teacher_not_finite(few, teach):
    learn = Learner(few, Dict(tiny_cnn(), noop), loss_func=lambda p,y: F.cross_entropy(p['logits'], y))
    with pytest.raises(ValueError, match='not finite: 640 of 640'): fit(learn, cbs=KD(Dict(teach.model, lambda o: o*float('nan')), DictLoss({'logits':'kd'})))
    assert all(p.isfinite().all() for p in learn.model.parameters())

def test_ensemble_of_probabilities(few, teach, tmp_path):
    "Each member is looked at: the average of probabilities looks like logits"
    learn = digits_learner(few, path=tmp_path)
    refused(ValueError, ['probabilities'], learn, lambda: KD([Wrap(teach.model, lambda o: o.softmax(1))]*2), teach.model)
    with pytest.warns(UserWarning, match='between 0 and 1'): fit(learn, cbs=KD(Wrap(teach.model, torch.sigmoid)))

def test_vocabulary_of_another_length(few, teach, tmp_path):
    learn = digits_learner(few, path=tmp_path)
    with pytest.warns(UserWarning): refused(ValueError, ['answers with 10 values','names 11'], learn, lambda: KD(Teacher(teach.model, vocab=['other',*few.vocab])), teach.model)

@pytest.mark.parametrize('make,says', [(lambda m: Wrap(m, lambda o: o*float('nan')), 'not finite'), (lambda m: m, None)])
def test_nothing_moves_before_an_error(few, teach, tmp_path, make, says):
    "Batch norm included: what is wrong from the start is found before the student sees a batch"
    learn,m = digits_learner(few, path=tmp_path),make(teach.model)
    if says: return refused(ValueError, [says], learn, lambda: KD(m), m)
    for loss,o in ((KDLoss(T=0), '`T`'), (KDLoss(reduction='none'), 'one number'), (KDLoss(mode='papr'), "Did you mean 'paper'")): refused(ValueError, [o], learn, lambda: KD(m, loss), m)
    refused(ValueError, ['`alpha`'], learn, lambda: KD(m, alpha=SchedLin(0,2)), m)
    refused(ValueError, ['`T`'], learn, lambda: KD(m, T=SchedLin(2,-2)), m)

def test_compiled_student(few, teach):
    learn = digits_learner(few)
    learn.model = torch.compile(learn.model, backend='eager')
    w = [p.detach().clone() for p in learn.model.parameters()]
    fit(learn, cbs=KD(teach))
    assert not any(torch.equal(a, b) for a,b in zip(w, learn.model.parameters()))

def test_one_output_per_item():
    "A student of shape `(n,)`, labels 0 and 1"
    x = torch.randn(64,4)
    dls = DataLoaders.from_dsets(*[[(a,b) for a,b in zip(x, (x.sum(1)>0).float())]]*2, bs=32, num_workers=0)
    def net(): return nn.Sequential(nn.Linear(4,1), nn.Flatten(0))
    learn,t,seen = Learner(dls, net(), loss_func=nn.BCEWithLogitsLoss()),net(),Seen()
    fit(learn, cbs=[KD(t, T=2.), seen])
    x,y,s,loss = seen.parts[0]
    with torch.no_grad(): p,q = (t(x)/2).sigmoid(),(s/2).sigmoid()
    kl = (p*(p/q).log()+(1-p)*((1-p)/(1-q)).log()).mean()
    assert loss==pytest.approx((.5*F.binary_cross_entropy_with_logits(s, y)+.5*4*kl).item(), rel=1e-4)

def test_inputs_made_by_a_callback(few, teach):
    "Batches that only fit the models after another callback has changed them"
    class Flip(Callback):
        def before_batch(self): self.learn.xb = (self.x.permute(0,3,1,2),)
    dls = DataLoaders.from_dsets(*[[(x.permute(1,2,0),y) for x,y in ds] for ds in (few.train_ds,few.valid_ds)], bs=64, num_workers=0)
    learn,seen = Learner(dls, tiny_cnn(), loss_func=CrossEntropyLossFlat(), cbs=Flip()),Seen()
    fit(learn, cbs=[KD(teach, alpha=1, T=1.), seen])
    x,y,pred,loss = seen.parts[0]
    with torch.no_grad(): t = teach.model.eval()(x)
    assert loss==pytest.approx(F.kl_div(pred.log_softmax(1), t.softmax(1), reduction='batchmean').item(), rel=1e-5)

def test_columns_survive_a_validation_inside(few, teach):
    class Validates(Callback):
        order = 80
        def after_epoch(self):
            if self.epoch==0 and not self.learn.lock.locked(): self.n = len(self.learn.validate())
    learn,cb = digits_learner(few, cbs=KD(teach)),Validates()
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 1e-2, cbs=cb)
    assert 'kd_loss' in learn.recorder.metric_names and np.isfinite(learn.recorder.values[-1]).all()
    assert [m.name for m in learn.metrics]==['accuracy'] and len(learn.validate())==2

def test_fastai_keeps_its_names():
    import fastai.callback.mixup as m
    assert reduce_loss is m.reduce_loss

def test_inputs_added_by_a_callback(few, teach):
    "Models of two inputs, of which a callback makes the second"
    class Two(nn.Module):
        def __init__(self, m): super().__init__(); self.m = m
        def forward(self, x, k): return self.m(x)*k
    class Add(Callback):
        def before_batch(self): self.learn.xb = (self.x,torch.full((), 2.))
    learn,seen = digits_learner(few, cbs=Add()),Seen()
    learn.model = Two(learn.model)
    fit(learn, cbs=[KD(Two(teach.model), alpha=1, T=1.), seen])
    x,y,pred,loss = seen.parts[0]
    with torch.no_grad(): t = 2*teach.model.eval()(x)
    assert loss==pytest.approx(F.kl_div(pred.log_softmax(1), t.softmax(1), reduction='batchmean').item(), rel=1e-5)

def test_teacher_of_two_inputs(few, tmp_path):
    class Two(nn.Module):
        def __init__(self): super().__init__(); self.m = tiny_cnn()
        def forward(self, a, b): return self.m(a+b)
    refused(ValueError, ['cannot run on the student','(599, 1, 8, 8)','input_tfm'], digits_learner(few, path=tmp_path), lambda: KD(Two()))

def test_mixup_compares_once_without_labels(few, teach):
    "Only a loss of labels is computed for both of a mixed item's"
    calls = []
    class Counted(KDLoss):
        def forward(self, *args, **kwargs):
            calls.append(1)
            return super().forward(*args, **kwargs)
    learn = digits_learner(few)
    fit(learn, cbs=[MixUp(), KD(teach, Counted())])
    assert len(calls)==len(few.train)+1 # and the look before training
