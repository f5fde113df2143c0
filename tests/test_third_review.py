"What a hostile reading of the evidence found: each of these was wrong"
import warnings
import numpy as np,pandas as pd,pytest
from fastai.tabular.all import *
from fastkd.all import *
from fastkd.test_utils import digits_dls,digits_learner
for o in [o for o in globals() if o.startswith('test')]: del globals()[o]

@pytest.fixture(autouse=True)
def quiet(): warnings.simplefilter('ignore')

def frame(n=60, seed=0):
    x = np.random.default_rng(seed).normal(size=n)
    return pd.DataFrame(dict(a=x, y=np.where(x>0, 'y', 'n')))
def table(df=None): return TabularDataLoaders.from_df(frame() if df is None else df, procs=[Normalize], cont_names=['a'], y_names='y', y_block=CategoryBlock(), valid_idx=range(40,60), bs=20)
def make(dls): return tabular_learner(dls, layers=[4], metrics=accuracy)
def experiment(make, teacher, dls, methods='kd', n_seeds=1, n_epoch=1, **kw): return distill_experiment(make, teacher, dls, methods, n_seeds, n_epoch, bar=False, **kw)
def rows(**vs): return [dict(seed=i, method=k, error='', valid={'accuracy':v}, test=None, step_ms=1., seconds=1., init='', curve=[]) for k,o in vs.items() for i,v in enumerate(o)]
def made_up(**vs): return Experiment(rows(**vs), list(vs), 'accuracy', margin=vs.pop('margin', None))

class TestTables:
    def test_runs(self):
        dls = table()
        e = experiment(make, make(dls), dls)
        assert e.table.seeds.tolist()==[1,1]
    def test_new_rows(self):
        "The index of a new table begins at 0, as that of the training table does"
        dls = table()
        assert experiment(make, make(dls), dls, test=frame(30, 1)).table.seeds.tolist()==[1,1]
    def test_known_rows(self):
        dls,df = table(),frame().iloc[:20].copy()
        df.index = range(1000, 1020)
        with pytest.raises(ValueError, match='20 of the 20 test items are training items'): experiment(make, make(dls), dls, test=df)
        df = pd.concat([df, frame(30, 1)], ignore_index=True)
        with pytest.warns(UserWarning, match='20 of the 50 rows'):
            warnings.simplefilter('always')
            experiment(make, make(dls), dls, test=df)
    def test_other_rows_of_one_index(self):
        student,teacher = make(table()),make(table(frame().sample(frac=1, random_state=0).reset_index(drop=True)))
        with pytest.raises(ValueError, match='different validation sets'): DistillationInterpretation.from_learners(student, teacher)
        assert len(DistillationInterpretation.from_learners(student, make(table())).student)==20

def test_batches_with_answers(tmp_path):
    "The student alone leaves them where they are"
    dls,t = digits_dls(60, bs=30),digits_learner(digits_dls(60))
    store = precompute_targets(t, dls, tmp_path/'s', bar=noop)
    plain = experiment(digits_learner, t, dls).table['mean'].tolist()
    for o in (None,t,store): assert np.allclose(experiment(digits_learner, o, store.attach(dls)).table['mean'], plain, atol=2e-3)

def test_another_teacher_at_the_path(tmp_path):
    dls = digits_dls(40, bs=20)
    net = lambda w: lambda d: digits_learner(d, w)
    kw = dict(n_epoch=1, lr=1e-2, bar=noop, n_folds=2)
    small_data_targets(net((2,4)), dls, tmp_path/'s', **kw)
    small_data_targets(net((2,4)), dls, tmp_path/'s', **kw)
    with pytest.raises(ValueError): small_data_targets(net((4,8)), dls, tmp_path/'s', **kw)
    with pytest.raises(ValueError): small_data_targets(net((2,4)), dls, tmp_path/'s', cbs=MixUp(), **kw)

def test_errors_are_better_lower():
    assert all(map(lower_is_better, ('_rmse','_exp_rmspe','mae','valid_loss','wer'))) and not any(map(lower_is_better, ('accuracy','r2_score','dice')))

class TestWords:
    def test_rounding(self):
        "Accuracy is float32: six items more in each seed is the same gain in each"
        f = lambda k: float(torch.tensor(float(k))/599)
        e = made_up(alone=[f(k) for k in (500,510,520,505,515)], kd=[f(k+6) for k in (500,510,520,505,515)])
        assert e.table.diff_sd['kd']==0 and np.isnan(e.table.p['kd']) and e.table.verdict['kd']=='not enough seeds'
    def test_few_ties(self):
        assert made_up(alone=[.5,.75], kd=[.5,.75]).table.verdict['kd']=='not enough seeds'
        assert made_up(alone=[.5,.75]*3, kd=[.5,.75]*3).table.verdict['kd']=='no gain'
    def test_less_than_the_margin(self):
        e = made_up(alone=[.979,.980,.981,.980,.980], kd=[.987,.988,.989,.9885,.9875])
        assert e.table.verdict['kd']=='no gain' and 'a difference there is' in e.verdict()
    def test_best_by_chance(self):
        e = made_up(alone=[.5,.51,.49,.5,.5], kd=[.53,.54,.52,.53,.531], lucky=[.9,.3,.8,.4,.7])
        assert e.table.verdict['kd']=='helps' and e.best=='lucky' and 'Best on the validation set: lucky, which may be chance' in e.verdict()
    def test_common_seeds(self):
        e = Experiment(rows(alone=[.95,.5,.5], kd=[.94]), ['alone','kd'], 'accuracy')
        assert e.best=='alone'
    def test_not_run(self):
        e = Experiment(rows(alone=[.5]), ['alone','kd'], 'accuracy')
        assert e.table.verdict['kd']=='' and 'nothing to compare yet' in e.verdict() and e._repr_html_()
        plt.close(e.plot().figure)
    def test_no_value(self):
        rs = rows(alone=[.5,.6], kd=[.5,.6])
        rs[0]['valid']['accuracy'] = None
        assert Experiment(rs, ['alone','kd'], 'accuracy').table.seeds.tolist()==[1,2]
        assert Experiment([], ['alone','kd'], 'accuracy')._repr_html_()

TEMP = 1.
def test_goes_on_only_with_the_same(tmp_path):
    global TEMP
    dls = digits_dls(60, bs=30)
    t = digits_learner(dls)
    mine = {'mine':lambda learn: KnowledgeDistillation(t, T=TEMP, alpha=.9)}
    experiment(digits_learner, t, dls, mine, path=tmp_path/'e')
    TEMP = 20.
    with pytest.raises(ValueError, match='other settings'): experiment(digits_learner, t, dls, mine, path=tmp_path/'e')
    TEMP = 1.
    with pytest.raises(ValueError, match='the name of the student alone'): experiment(digits_learner, t, dls, mine, path=tmp_path/'e', alone='baseline')
    assert load_experiment(tmp_path/'e').names==['student alone','mine']

def test_few_items_differ_by_chance():
    "44 % of 32 labels and 56 % of 16 are no sign of wrong labels"
    from fastkd.tune import _beyond
    t = pd.Series(dtype=float)
    t.attrs.update(train=32, valid=16)
    assert _beyond(t)>.12
    t.attrs.update(train=1024, valid=512)
    assert _beyond(t)==.1
