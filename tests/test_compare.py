"Answers of whatever answers, the measures made of them, and the table that compares models"
import io,warnings
import numpy as np,pandas as pd,pytest,torch
from fastai.text.all import *
from fastai.tabular.all import *
from fastai.vision.all import *
from fastkd.all import *
from fastkd.compare import _front
from fastkd.test_utils import *
from test_modal_tabular import table,student as table_student
from test_modal_text import df as text_df,texts,learner as text_learner
for k in [k for k in globals() if k.startswith('test')]: del globals()[k]

def quiet(learn):
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.logger = noop
    return learn
@functools.cache
def data(n, task, vocab): return digits_dls(n, task=task, vocab=vocab and list(vocab))
def digits(n=100, widths=(4,4), seed=0, task='digit', vocab=None): return quiet(digits_learner(data(n, task, vocab), widths, seed=seed))
def fit(learn, n=2):
    learn.fit(n, 1e-2)
    return learn
def close(a, b, tol=1e-5): np.testing.assert_allclose(np.asarray(a, dtype=float), np.asarray(b, dtype=float), rtol=tol, atol=tol)
def raw(learn, *ms):
    "Logits and labels by a plain loop over the validation set"
    zs,ys = [[] for _ in ms],[]
    for xb,yb in learn.dls.valid:
        for m,o in zip(ms, zs):
            with torch.no_grad(): o.append(m.eval()(xb.as_subclass(Tensor)))
        ys.append(yb.as_subclass(Tensor))
    return [torch.cat(o) for o in zs],torch.cat(ys)
def state(learn):
    "What must not change"
    r = learn.recorder
    own = {k:v for k,v in vars(learn).items() if not isinstance(v, Callback)}
    return ([m.training for m in learn.model.modules()], list(learn.cbs), [cb.learn is learn for cb in learn.cbs], list(own), {k:id(v) for k,v in own.items()}, [list(getattr(r, k, ())) for k in ('values','losses','lrs','iters')],
        vars(r.smooth_loss).copy(), [o.clone() for o in learn.model.state_dict().values()], torch.get_rng_state(), np.random.get_state()[1], random.getstate(), learn.opt is not None and [h.copy() for h in learn.opt.hypers])
def same(a, b):
    if isinstance(a, (Tensor,np.ndarray)): return bool((a==b).all())
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(v, b[k]) for k,v in a.items())
    if isinstance(a, (list,tuple)): return len(a)==len(b) and all(map(same, a, b))
    return a==b

# answers
def test_answers_are_in_the_order_of_the_data_set():
    learn = digits(150)
    a = get_answers(learn, dl=0)
    assert a.items.tolist()==list(range(150))
    ds = learn.dls.train.dataset
    assert a.targ.tolist()==[int(y) for _,y in ds]
    with torch.no_grad(): close(a.logits, learn.model.eval()(torch.stack([x.as_subclass(Tensor) for x,_ in ds])))

@pytest.mark.parametrize('make', [lambda t: t, lambda t: t.model, lambda t: Teacher(t), lambda t: Ensemble([t])])
def test_answers_of_a_teacher_are_in_the_students_classes(make):
    teacher,s = fit(digits()),digits(vocab='9876543210')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        a = get_answers(make(teacher), s)
    (z,),y = raw(s, teacher.model)
    if make(teacher) is not teacher.model: z = z.flip(1) # a module alone has no names
    close(a.log_probs, F.log_softmax(z, 1), 1e-4)
    assert a.targ.tolist()==y.tolist() and a.vocab==list('9876543210')

def test_a_learner_is_as_it_was():
    learn = fit(digits())
    learn.add_cb(SaveModelCallback())
    learn.model.train()
    learn.model[0].eval()
    before = state(learn)
    get_answers(learn, metrics=True)
    assert same(before, state(learn))
    with pytest.raises(KeyboardInterrupt): get_answers(learn, metrics=[AvgMetric(lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))])
    assert same(before, state(learn))
    fit(learn, 1)

def test_a_teacher_is_as_it_was_where_it_fails():
    s,t = digits(),Teacher(nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(64, 7)), vocab=list('0123456789'))
    with pytest.raises(ValueError, match='answers with 7'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        get_answers(t, digits(vocab='9876543210'))
    assert t.idx is None and all(m.training for m in t.model.modules())

def test_texts_come_back_in_order():
    learn = text_learner(texts(), metrics=accuracy)
    a = get_answers(learn, metrics=True)
    ds = learn.dls.valid_ds
    assert a.targ.tolist()==[int(y) for _,y in ds] and a.logits.shape==(15,3)
    p,_ = learn.get_preds()
    close(a.probs, p, 1e-4)
    close(a.metrics['accuracy'], a.accuracy)

def test_a_language_model_has_positions():
    learn = text_learner(texts(True, bs=2), metrics=accuracy)
    a = get_answers(learn, metrics=True)
    learn.model.reset()
    with torch.no_grad(): bs = [(learn.model.eval()(x.as_subclass(Tensor))[0].flatten(0, 1),y.as_subclass(Tensor).flatten()) for x,y in learn.dls.valid]
    z,y = map(torch.cat, zip(*bs))
    # positions of each text after each other, not batch by batch
    close(a.logits.sort(0)[0], z.sort(0)[0], 1e-4)
    assert sorted(a.targ.tolist())==sorted(y.tolist())
    close(a.accuracy, (z.argmax(1)==y).float().mean())
    assert a.logits.ndim==2 and a.logits.shape[1]==len(a.vocab) # the last texts are shorter

@pytest.mark.parametrize('loss,make', [(CrossEntropyLossFlat,lambda y: y), (BCEWithLogitsLossFlat,lambda y: y)])
def test_soft_and_single_labels(loss, make):
    x = torch.randn(20, 5)
    y = torch.randint(0, 2, (20,)) if loss is CrossEntropyLossFlat else torch.randint(0, 2, (20,)).float()
    dl = DataLoader(list(zip(x, y)), bs=7, shuffle=True, drop_last=True)
    learn = quiet(Learner(DataLoaders(dl, dl), nn.Linear(5, 2 if loss is CrossEntropyLossFlat else 1), loss_func=loss()))
    a = get_answers(learn)
    with torch.no_grad(): z = learn.model(x)
    close(a.logits, z)
    close(a.accuracy, ((z.argmax(1) if z.shape[1]==2 else z[:,0]>0)==y).float().mean())

def test_a_shuffling_torch_loader_is_refused():
    dl = torch.utils.data.DataLoader(list(zip(torch.randn(9, 3), torch.randint(0, 2, (9,)))), batch_size=4, shuffle=True)
    learn = quiet(Learner(DataLoaders(dl, dl), nn.Linear(3, 2), loss_func=F.cross_entropy))
    with pytest.raises(ValueError, match='shuffles'): get_answers(learn)
    assert len(get_answers(learn, dl=torch.utils.data.DataLoader(dl.dataset, batch_size=4)))==9

def test_an_unknown_loss_needs_a_kind():
    learn = digits()
    learn.loss_func = lambda p,y: F.cross_entropy(p, y)
    with pytest.raises(ValueError, match="kind='softmax'"): get_answers(learn)
    assert get_answers(learn, kind='softmax').kind=='softmax'
    with pytest.raises(ValueError, match="kind='softmax'"): compare([learn])
    assert 0<=compare([learn], kind='softmax', n_timed=0)['accuracy'].iloc[0]<=1

# the table
def test_the_numbers_of_the_table(tmp_path):
    t,s = fit(digits(300, (8,8)), 4),fit(digits())
    (zt,zs),y = raw(s, t.model, s.model)
    got = compare(dict(big=t, small=s), n_timed=3)
    assert list(got.index)==['big','small']
    for k,l,z in (('big',t,zt),('small',s,zs)):
        r = got.loc[k]
        close(r['accuracy'], l.validate()[1])
        close(r['agreement'], (z.argmax(1)==zt.argmax(1)).float().mean())
        p,q = zt.log_softmax(1),z.log_softmax(1)
        close(r['kl'], (p.exp()*(p-q)).sum(1).mean())
        conf,ok,e = z.softmax(1).max(1).values.double(),z.argmax(1)==y,0.
        for b in range(15):
            m = (conf>b/15)&(conf<=(b+1)/15)
            if m.any(): e += m.float().mean()*(conf[m].mean()-ok[m].double().mean()).abs()
        close(r['ece'], e)
        assert r['params']==sum(p.numel() for p in l.model.parameters())
        torch.save(l.model.state_dict(), tmp_path/'m.pth')
        assert abs(r['MB']*1e6-(tmp_path/'m.pth').stat().st_size)<600
    # 8×8 positions, then 4×4
    close(got.loc['small','MFLOPs'], 2*(64*4*9+16*4*4*9+4*10)/1e6)
    assert (got[['ms_1','ms_64']]>0).all(None)

def test_comparing_changes_nothing():
    ls = dict(t=fit(digits()), s=fit(digits(seed=1)))
    ls['s'].model.eval()
    ls['t'].add_cb(KnowledgeDistillation(ls['s'].model))
    before = [state(l) for l in ls.values()]
    compare(ls, n_timed=3)
    for b,l in zip(before, ls.values()): assert same(b, state(l))

def test_whatever_answers(tmp_path):
    s,t = fit(digits()),fit(digits(300, (8,8)))
    t.export(tmp_path/'big.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        a = compare([tmp_path/'big.pkl',s,t], n_timed=0)
        b = compare(dict(big=Teacher(t), x=t.model, both=[s,t], s=s), n_timed=0)
    assert list(a.index)==['big','student 1','student 2']
    for c in ('accuracy','kl','params','MFLOPs'): close([a.loc['big',c]]*3, [a.loc['student 2',c],b.loc['big',c],b.loc['x',c]])
    assert b.loc['both','params']==b.loc['big','params']+b.loc['s','params']
    # a module needs data
    assert list(compare(dict(m=t.model), dls=s.dls, n_timed=0).index)==['m']
    with pytest.raises(ValueError, match='pass `dls`'): compare([t.model])

def test_one_metric_that_only_one_has():
    t,s = digits(),digits(seed=1)
    t.metrics = [error_rate,F1Score(average='macro')]
    got = compare([t,s], n_timed=0)
    assert list(got.columns)[:3]==['error_rate','f1_score','accuracy']
    close(got['error_rate'], 1-got['accuracy'])
    close(got['f1_score'], [F1Score(average='macro')(*(lambda p,y: (p.argmax(1),y))(*l.get_preds())) for l in (t,s)])
    assert got._best('error_rate')==[got.index[got['error_rate'].argmin()]]

def test_classes_in_another_order():
    t,s = fit(digits()),fit(digits(vocab='9876543210'))
    (zt,zs),y = raw(t, t.model, s.model)
    got = compare([t,s], n_timed=0).loc['student']
    close(got['agreement'], (zt.argmax(1)==9-zs.argmax(1)).float().mean())
    close(got['accuracy'], (y==9-zs.argmax(1)).float().mean())
    close(got['kl'], F.kl_div(zs.flip(1).log_softmax(1), zt.log_softmax(1), log_target=True, reduction='batchmean'), 1e-4)

def test_data_of_ones_own():
    t,s = fit(digits()),fit(digits(vocab='9876543210'))
    dl = t.dls.test_dl(t.dls.train.items[:50], with_labels=True)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        got = compare([t,s], dl, n_timed=0)
        more = compare([t,s], digits_dls(300), n_timed=0)
        free = compare([t,s], t.dls.test_dl(t.dls.train.items[:50]), n_timed=0)
    close(got['accuracy'], [t.validate(dl=dl)[1], s.validate(dl=s.dls.test_dl(dl.items, with_labels=True))[1]])
    close(more['accuracy'], [l.validate()[1] for l in (t,s)])
    # without labels no accuracy
    assert list(free.columns)==['agreement','kl','params','MB','MFLOPs']
    close(free['kl'], got['kl'])

@pytest.mark.parametrize('task,cols', [('traits',['accuracy_multi','agreement','kl','ece']), ('center',['mae','difference']), ('ink',['foreground_acc','agreement','kl','ece'])])
def test_tasks(task, cols):
    t,s = digits(task=task),digits(task=task, seed=1)
    got = compare([t,s], n_timed=0, n_items=50)
    assert list(got.columns)==[*cols,'params','MB','MFLOPs']
    dl = s.dls.test_dl(s.dls.valid.items[:50], with_labels=True)
    close(got.loc['student',cols[0]], s.validate(dl=dl)[1], 1e-4)
    if task=='center': close(got.loc['student','difference'], (t.get_preds(dl=dl)[0]-s.get_preds(dl=dl)[0]).abs().mean(), 1e-4)
    s.metrics = t.metrics = []
    assert list(compare([t,s], n_timed=0, n_items=50).columns)[0]==('mae' if task=='center' else 'accuracy')

def test_texts_and_tables():
    a,b = text_learner(texts(), metrics=accuracy),text_learner(texts(), 10, 12, 3, seed=1, metrics=accuracy)
    got = compare([b,a], n_timed=2, sizes=(4,))
    assert list(got.columns)==['accuracy','agreement','kl','ece','params','MB','MFLOPs','ms_4'] and got.notna().all(None)
    close(got['accuracy'], [l.validate()[1] for l in (b,a)])
    a,b = (text_learner(texts(True, bs=2), seed=i, metrics=[accuracy,Perplexity()]) for i in range(2))
    got = compare([a,b], n_timed=0)
    assert [c for c in got if c in ('accuracy','perplexity','kl')]==['accuracy','perplexity','kl']
    close(got['perplexity'], [l.validate()[2] for l in (a,b)], 1e-4)
    assert got._lower('perplexity')
    t,s = table_student(table(), (16,), metrics=accuracy),table_student(table(), seed=1, metrics=accuracy)
    got = compare([t,s], n_timed=2, bar=False)
    close(got['accuracy'], [quiet(l).validate()[1] for l in (t,s)])
    close(got.loc['student','agreement'], (t.get_preds()[0].argmax(1)==s.get_preds()[0].argmax(1)).float().mean())

def test_stored_targets_do_not_disturb(tmp_path):
    t = fit(digits())
    s = digits(seed=1)
    store = precompute_targets(t, s.dls, tmp_path/'s', bar=noop)
    with_t = quiet(digits_learner(store.attach(s.dls), (4,4), seed=1, cbs=KnowledgeDistillation()))
    close(compare([t,with_t], n_timed=0).values.astype(float), compare([t,s], n_timed=0).values.astype(float))

def test_a_student_that_diverged_has_a_row():
    t,s = digits(),digits()
    with torch.no_grad(): s.model[-1].weight.fill_(float('nan'))
    got = compare([t,s], n_timed=0)
    assert got.loc['student',['kl','ece']].isna().all() and got.loc['teacher',['kl','ece']].notna().all()
    assert repr(got).count('n/a')==2 and 'student' not in got._best('ece')
    got.plot_pareto('kl')
    plt.close('all')

# what is refused
def test_refused():
    t = digits()
    for bad,err,msg in (([], ValueError, 'empty'), ({}, ValueError, 'empty'), (3, TypeError, 'a list'), ([tiny_cnn], TypeError, 'a teacher is'), ([t,nn.Linear], TypeError, 'the class Linear'),
        ([('a',t),('a',t)], ValueError, "called 'a'"), ([t,digits(task='traits')], ValueError, 'different classes'), ([t,digits(vocab='0123456789x')], ValueError, r"only 'student' has \['x'\]")):
        with pytest.raises(err, match=msg): compare(bad, n_timed=0)
    for bad,msg in ((nn.Sequential(t.model, nn.Softmax(1)), "'student': .*probabilities"), (tiny_cnn(c=7), "'student': .*7 classes")):
        with pytest.raises(ValueError, match=msg): compare([t,bad], n_timed=0)
    with pytest.raises(ValueError, match='are not those of yes or no'): compare([t], kind='binary', n_timed=0)
    with pytest.raises(TypeError, match='got int'): compare([t], 0, n_timed=0)
    with pytest.raises(ValueError, match='no validation set'): compare([Learner(DataLoaders(t.dls.train), t.model, loss_func=t.loss_func)])
    with pytest.raises(ValueError, match='n_timed'): compare([t], n_timed=-1)
    with pytest.raises(ValueError, match='sizes'): compare([t], sizes=(0,))

def items_learner(n=20, flip=False, seed=0, y0=0):
    "Numbers, whose own split and labels can be changed"
    items = [f'item{i}' for i in range(40)]
    val = list(range(40-n, 40))[::-1 if flip else 1]
    db = DataBlock((TransformBlock,CategoryBlock(vocab=['0','1'])), get_items=lambda _: items, get_x=lambda o: torch.full((3,), float(o[4:])), get_y=lambda o: str((int(o[4:])+(y0 if o=='item39' else 0))%2), splitter=lambda _: (list(range(40-n)), val))
    set_seed(seed)
    return quiet(Learner(db.dataloaders(None, bs=8, num_workers=0), nn.Linear(3, 2), metrics=accuracy))

def test_other_validation_sets_are_refused_by_name():
    t = items_learner()
    for s,msg in ((items_learner(15), 'of 15 and 20 items'), (items_learner(flip=True), 'different orders'), (items_learner(y0=1), 'differ from those of .big. in 1 of 20')):
        with pytest.raises(ValueError, match=msg): compare(dict(big=t, small=s), n_timed=0)
    o = items_learner()
    o.dls.valid.dataset.tls[0].items = L(f'item{i}' for i in range(10, 30))
    o.dls.valid.dataset.tls[1].items = o.dls.valid.dataset.tls[0].items
    with pytest.raises(ValueError, match="10 of 20 items of 'small'"): compare(dict(big=t, small=o), n_timed=0)
    # the data to compare on
    assert len(compare([t,items_learner(15)], t.dls, n_timed=0))==2
    assert len(compare([t], n_timed=0))==1 and len(compare(t, n_timed=0))==1
    assert 'agreement' not in compare(t, n_timed=0)

def test_files_are_the_same_from_any_folder(tmp_path):
    def learner(path, root=tmp_path):
        fs = [root/f'{i}.png' for i in range(6)]
        db = DataBlock((TransformBlock,CategoryBlock(vocab=['0','1'])), get_items=lambda _: fs, get_x=lambda o: torch.full((3,), float(o.stem)), get_y=lambda o: str(int(o.stem)%2), splitter=IndexSplitter([3,4,5]))
        return quiet(Learner(db.dataloaders(None, path=path, bs=2, num_workers=0), nn.Linear(3, 2)))
    t = learner(tmp_path)
    assert len(compare([t,learner('.')], n_timed=0))==len(compare([t,learner(tmp_path/'x', tmp_path/'x')], n_timed=0))==2
    with pytest.raises(ValueError, match='3 of 3 items'): compare([t,learner('.', tmp_path/'x')], n_timed=0)

def test_another_kind_is_refused():
    t,s = items_learner(),items_learner()
    s.model,s.loss_func,s.metrics = nn.Linear(3, 1),BCEWithLogitsLossFlat(),[]
    with pytest.raises(ValueError, match="binary"): compare([t,s], n_timed=0)

def test_cost_table_counts_as_compare_does():
    "Attention, too, which in eval mode torch runs in one piece that its counter does not know"
    m = nn.Sequential(nn.Flatten(1, 2), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(64, 10))
    learn = quiet(Learner(data(100, 'digit', None), m, metrics=accuracy))
    n = cost_table(learn).multiplications['student']
    # projections in and out, scores and values, the two layers behind, the head
    assert n==8*8*24+8*8*8+2*8*8*8+2*8*8*16+640==round(compare([learn], n_timed=0).MFLOPs.iloc[0]*1e6/2)

def test_precision_of_the_times():
    "On a GPU a Learner's mixed precision is that of its times; fastai has none elsewhere"
    from fastkd.compare import _in_precision
    learn,seen = digits().to_bf16(),[]
    m = learn.model
    assert _in_precision(m, learn.cbs, 'cpu') is m and _in_precision(m, digits().cbs, 'cuda') is m
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # without a GPU autocast says that it does nothing
        mp = pytest.MonkeyPatch()
        with mp.context() as p:
            real = torch.autocast
            def noted(*args):
                seen.append(args)
                return real('cpu', args[1], enabled=False)
            p.setattr(torch, 'autocast', noted)
            x = torch.rand(2,1,8,8)
            z = _in_precision(m.eval(), learn.cbs, 'cuda')(x)
            _in_precision(m, digits().to_fp16().cbs, 'cuda')(x)
    assert seen==[('cuda',torch.bfloat16),('cuda',torch.float16)] and torch.equal(z, m(x))

# how it looks
def test_marks_and_text():
    got = compare(dict(a=digits(), **{'<b>':digits(seed=1)}), n_timed=0)
    txt,htm = repr(got),got._repr_html_()
    assert txt.count('*')>=2 and '&lt;b&gt;' in htm and '<b>' in htm and '599 items' in txt
    # parts of it are tables, too
    for o in (got[['accuracy']], got[got.accuracy>2], got.T, got.describe(), got.sort_values('accuracy'), pd.concat([got,got])): assert isinstance(repr(o), str) and isinstance(o._repr_html_(), str)
    assert '*' not in repr(got.T)
    assert pickle.loads(pickle.dumps(got)).equals(got)
    assert isinstance(got['accuracy'].mean(), float)

def test_the_frontier():
    rng = np.random.default_rng(0)
    for _ in range(50):
        x,y = rng.integers(0, 5, 8).tolist(),rng.integers(0, 5, 8).tolist()
        f = _front(x, y)
        better = lambda j,i: x[j]<=x[i] and y[j]>=y[i] and (x[j]<x[i] or y[j]>y[i])
        want = {(x[i],y[i]) for i in range(8) if not any(better(j, i) for j in range(8))}
        assert {(x[i],y[i]) for i in f}==want and [x[i] for i in f]==sorted(x[i] for i in f)

def test_the_plot():
    got = compare([digits(),digits(seed=1)], n_timed=2)
    axs = got.plot_pareto()
    assert [a.get_xlabel() for a in axs]==['ms per item, batches of 64','MB on disk']
    assert sorted(t.get_text() for t in axs[0].texts)==['student','teacher']
    close(sorted(axs[0].collections[0].get_offsets().tolist()), sorted([list(o) for o in zip(got['ms_64'], got['accuracy'])]))
    with pytest.raises(ValueError, match="no column 'speed'"): got.plot_pareto(x='speed')
    assert len(got.plot_pareto('kl', 'params'))==1
    with pytest.raises(ValueError, match='1 axes|2 axes'): got.plot_pareto(axs=plt.subplots(1, 3)[1])
    plt.close('all')
