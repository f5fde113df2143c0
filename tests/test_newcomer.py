"What someone tries who has never distilled: it works, or the message says what to do instead"
from fastai.vision.all import *
from fastkd.all import *
from fastkd.test_utils import *
import pytest

# fastai brings fastcore's test helpers, which pytest would take for tests
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

KD = KnowledgeDistillation

@pytest.fixture(scope='module')
def teacher(): return digits_teacher(epochs=2, widths=(8,16,32))
@pytest.fixture
def student(): return digits_learner(digits_dls(128))

def fit(learn, *cbs):
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2, cbs=cbs)

@pytest.mark.parametrize('swap', [True,False])
def test_both_as_arguments(teacher, student, swap):
    with pytest.raises(TypeError, match='takes the teacher alone'): KD(*([student,teacher] if swap else [teacher,student]))

@pytest.mark.parametrize('loss', [nn.KLDivLoss(reduction='batchmean'), nn.CrossEntropyLoss(), CrossEntropyLossFlat(), nn.NLLLoss(), F.kl_div, F.cross_entropy], ids=lambda o: getattr(o, '__name__', type(o).__name__))
def test_torch_loss(teacher, loss):
    "KLDivLoss of logits is NaN, CrossEntropyLoss takes logits for probabilities: neither says so"
    with pytest.raises(ValueError, match='does not take the logits of student and teacher: `KDLoss'): KD(teacher, loss=loss)

def test_weights_as_teacher(teacher):
    with pytest.raises(TypeError, match='weights: load them into a model') as e: KD(teacher.model.state_dict())
    assert len(str(e.value))<200

def test_softmax_at_the_end(teacher):
    with pytest.warns(UserWarning, match='student answers with probabilities'): fit(Learner(digits_dls(128), nn.Sequential(tiny_cnn(), nn.Softmax(1)), metrics=accuracy), KD(teacher))

def test_compare_two(teacher, student):
    with pytest.raises(TypeError, match='as one dict'): compare(teacher, student)
