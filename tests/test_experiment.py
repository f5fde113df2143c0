"Did it help? The same but for the method, statistics by hand, and nothing lost"
import gc,time,weakref
import pytest,torch
from fastai.vision.all import *
from fastkd.all import *
from fastkd.experiment_log import _read
from fastkd.test_utils import *
from conftest import ended,start
from scipy import stats
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

def mlp(h): return nn.Sequential(nn.Flatten(), nn.Linear(64, h), nn.ReLU(), nn.Linear(h, 10))
def make_student(dls): return Learner(dls, mlp(8), metrics=accuracy)
def a_teacher(seed=0):
    with no_random(seed): return mlp(12)
def small(n=60): return digits_dls(n, bs=20)
dls,teacher = small(),a_teacher()
quick = dict(n_seeds=2, n_epoch=1, lr=1e-2, bar=noop)
def do(methods, make=make_student, teacher=teacher, data=dls, **kw): return distill_experiment(make, teacher, data, methods, **{**quick, **kw})
def numbers(e): return e.table.drop(columns='cost')

class Boom(Callback):
    "Fails in the second step of the runs that it is told to fail in"
    def __init__(self, when=lambda: True, err=RuntimeError): self.when,self.err = when,err
    def before_batch(self):
        if self.training and self.iter==1 and self.when(): raise self.err('boom')

class Noisy(DisplayedTransform):
    split_idx = 0
    def encodes(self, x:TensorImageBW): return x+.1*torch.randn_like(x)+random.random()+np.random.rand()

class TestAlike:
    "Within a seed, the method is all that differs"
    @pytest.fixture(scope='class')
    def feeds(self):
        fed,inits,rates = [],[],[]
        class Note(Callback):
            order = 150
            def before_fit(self):
                if not hasattr(self.learn, 'gather_preds'): inits.append([p.detach().clone() for p in self.model.parameters()])
            def before_batch(self):
                if self.training: fed.append((self.xb[0].as_subclass(Tensor).clone(), self.yb[0].tolist(), self.opt.hypers[-1]['lr'], torch.get_rng_state().sum().item()))
        def draws(inp, teach): return kd_loss(inp, teach)+0*(torch.randn(3).sum()+random.random()+np.random.rand())
        def make(dls): return Learner(dls, nn.Sequential(mlp(8)[:3], nn.Dropout(.5), nn.Linear(8, 10)), metrics=accuracy, cbs=Note())
        hint = Term('hint', '0.1', '1', weight=.1)
        with no_random(1): torch.randn(5); e = do({'off': dict(alpha=0., task_weight=1.), 'draws': dict(loss=draws), 'hint': KnowledgeDistillation(teacher, terms=hint)}, make, data=digits_dls(60, bs=20, batch_tfms=Noisy()), n_epoch=2)
        return e,fed,inits

    def test_batches(self, feeds):
        _,fed,_ = feeds
        assert len(fed)==2*4*2*3
        for s in range(2):
            runs = [fed[24*s+6*m:24*s+6*m+6] for m in range(4)]
            for r in runs[1:]:
                for a,b in zip(runs[0], r): assert torch.equal(a[0], b[0]) and a[1:]==b[1:]
        assert fed[0][1]!=fed[24][1] and fed[0][1]!=fed[3][1]

    def test_off_is_alone(self, feeds):
        "A method without weight is the student alone bit for bit, in every epoch"
        c = feeds[0].curves.set_index(['method','seed','epoch'])[['train_loss','valid_loss','accuracy']]
        assert c.loc['off'].equals(c.loc['student alone']) and not c.loc['hint'].equals(c.loc['off'])
        r = feeds[0].rows
        assert all(a['valid']==b['valid'] for a,b in zip([o for o in r if o['method']=='off'], [o for o in r if o['method']=='student alone']))

    def test_first_weights(self, feeds):
        e,_,inits = feeds
        assert len({(r['seed'],r['init']) for r in e.rows})==2
        fits = inits[::2] # fit and validate
        assert len(inits)==2*4*2 and all(all(map(torch.equal, fits[4*s], fits[4*s+m])) for s in range(2) for m in range(4))
        assert not torch.equal(fits[0][0], fits[4][0])

    def test_store(self, tmp_path):
        "Answers from a store: another DataLoader, the same batches"
        fed = []
        class Note(Callback):
            def before_batch(self):
                if self.training: fed.append(self.yb[0].tolist())
        data = small()
        store = precompute_targets(teacher, data, tmp_path/'s', bar=noop)
        e = do({'stored':KnowledgeDistillation(store), 'live':'kd'}, lambda dls: make_student(dls).add_cb(Note()), data=data)
        runs = np.array([len(o) for o in fed]).size//6
        assert all(fed[9*s:9*s+3]==fed[9*s+3:9*s+6]==fed[9*s+6:9*s+9] for s in range(2)) and runs==3
        a = {r['seed']:r['valid']['valid_loss'] for r in e.rows if r['method']=='stored'}
        b = {r['seed']:r['valid']['valid_loss'] for r in e.rows if r['method']=='live'}
        assert all(abs(a[s]-b[s])<1e-2 for s in a) # half precision

    def test_leaves_no_trace(self):
        data = small()
        torch.manual_seed(3); random.seed(3)
        state,rng,was = torch.get_rng_state(),data.train.rng,deepcopy(teacher.state_dict())
        py = random.getstate()
        do(['kd', dict(teacher_weight=1.)], data=data, n_seeds=1)
        assert torch.equal(torch.get_rng_state(), state) and data.train.rng is rng and random.getstate()==py
        assert all(torch.equal(v, was[k]) for k,v in teacher.state_dict().items())

    def test_models_are_freed(self):
        alive,most = [],[]
        def make(dls):
            most.append(sum(o() is not None for o in alive))
            learn = make_student(dls)
            alive.append(weakref.ref(learn.model))
            return learn
        do({'kd':'kd', 'bad':Boom()}, make)
        gc.collect()
        assert len(alive)==1+6 and not any(o() is not None for o in alive) and max(most)==0

class TestMethods:
    def test_by_hand(self):
        "A run is the fit that anyone would write"
        e = do({'kd':dict(alpha=.7, T=3.)}, n_seeds=1, n_epoch=2)
        data = small()
        from fastkd.experiment import _stream
        with no_random(0):
            learn = make_student(data)
            class Order(Callback):
                order,n = 200,0
                def before_train(self): self.n += 1; data.train.rng = _stream(0, self.n, 'order')
            with learn.no_bar(), learn.no_logging():
                learn.fit_one_cycle(2, 1e-2, cbs=[KnowledgeDistillation(teacher, alpha=.7, T=3.), Order()])
                loss,acc = learn.validate()
        assert e.rows[1]['valid']=={'valid_loss':loss, 'accuracy':acc}

    def test_ways_to_say_it(self):
        "Name, settings, callback, loss, list, function of each kind: one method, said in six ways"
        other = a_teacher(5)
        ms = {'name':'kd', 'dict':{}, 'loss':KDLoss(), 'cb':KnowledgeDistillation(teacher), 'empty':KnowledgeDistillation(), 'list':['kd', Callback()], 'f':lambda: 'kd', 'f2':lambda teacher: KnowledgeDistillation(teacher),
            'f3':lambda learn, teacher: learn.fit_one_cycle(1, 1e-2, cbs=KnowledgeDistillation(teacher)) , 'class':KnowledgeDistillation, 'partial':partial(KnowledgeDistillation, T=5.), 'other':dict(teacher=other)}
        e = do(ms, n_seeds=1)
        v = {r['method']:r['valid']['valid_loss'] for r in e.rows}
        assert not e.runs.error.any() and len({v[k] for k in ms if k!='other'})==1 and len({v['kd' if 'kd' in v else 'name'],v['other'],v['student alone']})==3

    def test_each_run_is_new(self):
        "A callback, its loss and its terms bring nothing from one run into the next"
        cb = KnowledgeDistillation(teacher, KDLoss(), T=SchedLin(8,1), terms=Term('hint', '1', '1'))
        both = do({'a':cb, 'b':cb}, n_seeds=1)
        a,b = [r for r in both.rows if r['method']!='student alone']
        assert a['valid']==b['valid'] and cb._loss.T==5. and cb.learn is None

    def test_names(self):
        assert do(['kd','kd',dict(alpha=.3),[KnowledgeDistillation(),MixUp()]], n_seeds=1).names==['student alone','kd','kd (2)','alpha=0.3','knowledge_distillation + mix_up']

    @pytest.mark.parametrize('ms,err,text', [({}, ValueError, 'empty'), ('kdd', ValueError, "'kdd'"), ({'a':dict(alfa=1)}, TypeError, "the method 'a'.*alfa"), ({'a':.9}, TypeError, 'a method is'),
        ({'student alone':'kd'}, ValueError, 'taken'), ({'a':lambda x: x}, ValueError, r"needs \['x'\]"), ({1:'kd'}, TypeError, 'names'), ({'a':lambda learn: None}, ValueError, 'did not train'), ({'a':None}, TypeError, 'a method is')])
    def test_bad_methods(self, ms, err, text):
        with pytest.raises(err, match=text): do(ms)

    @pytest.mark.parametrize('kw,text', [(dict(n_seeds=0), '`n_seeds`'), (dict(n_seeds=True), '`n_seeds`'), (dict(n_epoch=0), '`n_epoch`'), (dict(fit='fitt'), '`fit` must be'), (dict(fit=lambda l, c: None), '`n_epoch` and `lr` go'),
        (dict(metric='f1'), '`metric` must be'), (dict(margin=-1), '`margin`')])
    def test_bad_settings(self, kw, text):
        with pytest.raises(ValueError, match=text): do('kd', **kw)

    def test_bad_students(self):
        learn = make_student(dls)
        for bad,err,text in ((learn, TypeError, 'a function'), (lambda a, b: learn, TypeError, 'set them by `partial`'), (lambda: 3, ValueError, 'must return a Learner'),
            (lambda: Learner(small(80), mlp(8), metrics=accuracy), ValueError, "training set is not that"), (lambda: Learner(digits_dls(60, bs=20, vocab=list('9876543210')), mlp(8), metrics=accuracy), ValueError, 'classes')):
            with pytest.raises(err, match=text) as e: do('kd', bad)
            assert e.type is err # no class of our own in a message
        with pytest.raises(ValueError, match='other first weights'): do('kd', lambda: learn)
        with pytest.warns(UserWarning, match='begin with the same weights'): do('kd', lambda dls: digits_learner(dls, widths=(2,2,2)))
        e = do('kd', partial(digits_learner, widths=(2,2,2))) # takes `seed`
        assert len({r['init'] for r in e.rows})==2
        with pytest.raises(ValueError, match='changed the teacher'): do({'a':lambda learn, teacher: teacher.model[1].weight.data.add_(1) is None or 'kd'}, teacher=a_teacher())

    def test_fit(self):
        def fit(learn, cbs): learn.fit(1, 1e-2, cbs=cbs); learn.fit(1, 1e-3, cbs=cbs)
        e = do('kd', n_epoch=None, lr=None, fit=fit)
        assert e.curves.groupby(['seed','method']).epoch.max().tolist()==[1]*4
        with pytest.raises(ValueError, match='does not pass on'): do('kd', n_epoch=None, lr=None, fit=lambda learn, cbs: learn.fit(1))

    def test_scheme(self):
        "A function that trains by itself, in two fits"
        e = do({'hint':lambda learn, teacher: fit_fitnet(learn, teacher, '1', '1', n_epochs=(1,1), lr=1e-2)})
        assert e.curves[e.curves.method=='hint'].groupby('seed').epoch.max().tolist()==[1,1] and e.table.seeds.tolist()==[2,2]

class TestTables:
    def test_statistics(self):
        e = do(['kd',dict(alpha=.1)], n_seeds=4)
        v = e.runs.pivot(index='seed', columns='method', values='valid: accuracy')
        ps = []
        for nm in e.names[1:]:
            r,t = e.table.loc[nm],stats.ttest_rel(v[nm], v['student alone'])
            np.testing.assert_allclose([r['mean'],r.sd,r['diff'],r.lo,r.hi], [v[nm].mean(),v[nm].std(),(v[nm]-v['student alone']).mean(),*t.confidence_interval()], atol=2e-6)
            ps.append(t.pvalue)
        want = min(2*min(ps), 1)
        np.testing.assert_allclose(sorted(e.table.p[1:]), sorted([want, max(want, max(ps))]), rtol=1e-3)

    def test_metric(self):
        e = do('kd', metric='valid_loss', n_seeds=3)
        assert e.minimize and e.best==e.table['mean'].idxmin() and 'lower is better' in e.verdict()
        assert do('kd', metric=accuracy).metric=='accuracy' and do('kd', metric='accuracy', minimize=True).minimize
        e = do('kd', lambda dls: Learner(dls, mlp(8), metrics=[error_rate,accuracy]))
        assert (e.metric,e.minimize)==('error_rate',True)

    def test_test_split(self):
        "Reported on the test split, chosen on the validation set"
        items = L(digits_dls(400).train_ds.items)
        mine = {id(o[0]) for o in dls.train_ds.items}
        key = lambda o: o[0].tobytes()
        seen = {key(o) for o in dls.train_ds.items}
        held = [o for o in items if key(o) not in seen][:100]
        e = do(['kd',dict(alpha=.1)], test=held)
        dl = dls.test_dl(held, with_labels=True)
        assert all(len(r['test'])==2 for r in e.rows) and e.table['mean'].iloc[0]==np.mean([r['test']['accuracy'] for r in e.rows if r['method']=='student alone'])
        assert 'on the test set' in e.verdict() and 'too good' not in e.verdict() and e.best==e.table.valid.idxmax()
        same = do(['kd',dict(alpha=.1)], test=dl)
        assert numbers(same).equals(numbers(e))
        for bad,text in ((items[:0], 'empty'), (L(dls.valid_ds.items)[:50], 'validation items'), (L(dls.train_ds.items)[:50], 'training items')):
            with pytest.raises(ValueError, match=text): do('kd', test=bad)
        with pytest.raises(ValueError, match='no labels'): do('kd', test=dls.test_dl(held))

    def test_one_seed(self):
        e = do(['kd',dict(alpha=.1)], n_seeds=1)
        assert e.table.verdict.tolist()==['','one seed','one seed'] and e.table[['lo','hi','p']].isna().all().all()
        assert 'no evidence' in e.verdict() and 'helps' not in e.verdict() and 'e-' not in e.verdict()
        for o in (e.plot(), e.plot_curves()): plt.close(o.figure)
        assert 'no evidence' in repr(e) and '<table' in e._repr_html_()

    def test_no_gain(self):
        e = do({'same':dict(alpha=0., task_weight=1.)}, n_seeds=5)
        assert e.table.verdict['same']=='no gain' and e.table.loc['same',['diff','lo','hi']].tolist()==[0,0,0]

class TestFailures:
    def test_a_method_fails(self):
        "Recorded with its error; the rest goes on"
        n = []
        e = do({'bad':Boom(), 'kd':'kd', 'sometimes':Boom(lambda: n.append(1) or len(n)==2)}, n_seeds=3)
        t = e.table
        assert t.seeds.tolist()==[3,0,3,2] and t.failed.tolist()==[0,3,0,1] and t.verdict['bad']=='failed'
        assert [len(o) for o in e.diffs.values()]==[0,3,2]
        assert e.runs.error[e.runs.method=='bad'].str.contains('RuntimeError.*boom', regex=True, flags=re.S).all() and '3 runs of it failed' in e.verdict()
        want = do({'kd':'kd'}, n_seeds=3)
        assert numbers(want).loc['kd',['mean','sd','diff']].equals(t.loc['kd',['mean','sd','diff']])
        plt.close(e.plot().figure)

    def test_nan(self):
        "A run that ends in nan has failed"
        class Nan(Callback):
            def after_fit(self):
                if hasattr(self, 'recorder') and len(self.recorder.losses): self.model[1].weight.data.fill_(float('nan'))
        e = do({'nan':Nan(), 'kd':'kd'}, metric='valid_loss')
        assert 'no finite number' in e.runs.error.max() and e.table.failed['nan']==2

    def test_the_student_fails(self):
        with pytest.raises(RuntimeError, match='boom'): do('kd', lambda dls: make_student(dls).add_cb(Boom()))

    def test_interrupted_in_memory(self):
        n = []
        with pytest.warns(UserWarning, match='interrupted after 5 of 6'):
            e = do({'kd':'kd', 'i':Boom(lambda: n.append(1) or len(n)==2, KeyboardInterrupt)}, data=small())
        assert [(r['seed'],r['method']) for r in e.rows]==[(0,'student alone'),(0,'kd'),(0,'i'),(1,'student alone'),(1,'kd')] and e.table.seeds.tolist()==[2,2,1]

class TestDisk:
    ms = {'kd':'kd', 'hint':dict(terms=Term('hint', '1', '1', weight=.1))}

    def test_interrupt_and_go_on(self, tmp_path):
        whole,n = do(self.ms, n_seeds=3, path=tmp_path/'a'),[]
        def make(dls):
            n.append(1)
            if len(n)==6: raise KeyboardInterrupt
            return make_student(dls)
        with pytest.raises(KeyboardInterrupt): do(self.ms, make, n_seeds=3, path=tmp_path/'b')
        assert len(_read(tmp_path/'b'/'runs.jsonl')[0])==4
        e = do(self.ms, n_seeds=3, path=tmp_path/'b')
        assert numbers(e).equals(numbers(whole)) and e.curves.equals(whole.curves) and len(e.rows)==9
        assert e.verdict()==whole.verdict()==load_experiment(tmp_path/'b').verdict()

    def test_more(self, tmp_path):
        "More seeds and more methods use what is there; fewer show it"
        n = []
        def make(dls): n.append(1); return make_student(dls)
        do('kd', make, path=tmp_path)
        e = do(self.ms, make, n_seeds=3, path=tmp_path)
        assert len(n)==1+4+1+5 and numbers(e).equals(numbers(do(self.ms, n_seeds=3)))
        assert numbers(do('kd', make, path=tmp_path)).equals(numbers(do('kd'))) and len(n)==1+4+1+5+1
        assert len(load_experiment(tmp_path).rows)==9

    def test_failed_runs_are_tried_again(self, tmp_path):
        flag = tmp_path/'fails'
        flag.touch()
        cb = partial(Boom, when=flag.exists)
        e = do({'b':cb}, path=tmp_path/'e')
        assert e.table.failed['b']==2
        flag.unlink()
        e = do({'b':cb}, path=tmp_path/'e')
        assert e.table.failed['b']==0 and e.table.seeds['b']==2 and load_experiment(tmp_path/'e').table.seeds['b']==2

    def test_torn_line(self, tmp_path):
        "What a crash leaves of a line is done again; a damaged line before it is named"
        whole,f = do('kd', path=tmp_path),tmp_path/'runs.jsonl'
        lines = f.read_bytes().splitlines(keepends=True)
        for end in (lines[3][:-1], lines[3][:40], lines[3][:-30]+b'\n', b'\0'*50):
            f.write_bytes(b''.join(lines[:3])+end)
            assert len(load_experiment(tmp_path).rows)==3
            assert numbers(do('kd', path=tmp_path)).equals(numbers(whole)) and len(_read(f)[0])==4
        f.write_bytes(lines[0]+b'{]\n'+lines[2])
        with pytest.raises(ValueError, match='line 2 of'): do('kd', path=tmp_path)

    def test_another_experiment(self, tmp_path):
        "What differs is named"
        do({'kd':dict(alpha=.5)}, path=tmp_path)
        other = digits_dls(60, bs=20, seed=1)
        for kw,text in ((dict(n_epoch=2), 'training epochs: 1 there, 2 here'), (dict(lr=.1), 'learning rate'), (dict(fit='fit'), "fit: fit_one_cycle there"), (dict(teacher=a_teacher(3)), 'the teacher: '), (dict(data=other), 'the training set'),
            (dict(data=digits_dls(60, bs=30)), 'the batch size: 20 there, 30'), (dict(data=digits_dls(60, bs=20, vocab=list('9876543210'))), 'the classes'), (dict(make=lambda dls: Learner(dls, mlp(9), metrics=accuracy)), 'the student'), (dict(methods={'kd':dict(alpha=.6)}), 'kd: .*0.5.*0.6'),
            (dict(make=lambda dls: Learner(dls, mlp(8), metrics=error_rate)), 'its metrics'), (dict(data=digits_dls(60, bs=20, batch_tfms=Noisy())), 'the training set')):
            with pytest.raises(ValueError, match=text): do(**{'methods':{'kd':dict(alpha=.5)}, **kw}, path=tmp_path)
        assert len(do({'kd':dict(alpha=.5)}, data=small(), teacher=a_teacher(), path=tmp_path).rows)==4
        with pytest.raises(FileNotFoundError, match='no experiment'): load_experiment(tmp_path/'x')

    def test_method_said_by_code(self, tmp_path):
        "A schedule that is another function is another method"
        do({'kd':dict(alpha=lambda p: .5*p)}, n_seeds=1, path=tmp_path)
        do({'kd':dict(alpha=lambda p: .5*p)}, n_seeds=1, path=tmp_path)
        with pytest.raises(ValueError, match='kd: '): do({'kd':dict(alpha=lambda p: .6*p)}, n_seeds=1, path=tmp_path)

def _slow_run(path, stop):
    "Runs an experiment, and stands still in the fourth run"
    import torch
    torch.set_num_threads(1)
    n = []
    def make(dls):
        n.append(1)
        if stop and len(n)==5: Path(stop).touch(); time.sleep(600)
        return make_student(dls)
    do(TestDisk.ms, make, path=path)

class TestKilled:
    def test_kill(self, tmp_path):
        "Killed in the middle, gone on with by another process: the table of an uninterrupted run"
        p = start(_slow_run, tmp_path/'e', tmp_path/'stands')
        for _ in range(1200):
            if (tmp_path/'stands').exists() or not p.is_alive(): break
            time.sleep(.1)
        assert (tmp_path/'stands').exists()
        with pytest.raises(ValueError, match='another process'): do(TestDisk.ms, path=tmp_path/'e')
        p.kill()
        ended(p)
        assert len(load_experiment(tmp_path/'e').rows)==3
        p = ended(start(_slow_run, tmp_path/'e', None))
        assert p.exitcode==0
        e,want = load_experiment(tmp_path/'e'),do(TestDisk.ms)
        assert len(e.rows)==6 and e.names==want.names
        np.testing.assert_allclose(numbers(e)[['mean','sd','diff']].iloc[:,:2].astype(float), numbers(want)[['mean','sd']].astype(float), atol=1e-6)
