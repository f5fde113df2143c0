"""Is what `kd_find` suggests any good? Small students under a grid of temperatures and weights, the default, and the suggestion, on data sets of several kinds.

    python benchmarks/find.py                                        # all but CIFAR-10, 20 minutes on one core
    python benchmarks/find.py --only "CIFAR-10, 1500 labels" --folder cifar10   # CIFAR-10 as a folder of images, train/CLASS/*.jpg and test/CLASS/*.jpg
    python benchmarks/find.py --again                                # the suggestions anew, after a change of `kd_find`

Each row of find.csv is one run; rows that are there already are not run again. Students of a seed have the same initial weights and batches, whatever the setting. Where the setting is `suggested`, `kd_find` has looked at the data and at the student before its first step, and T and alpha are what it said; where it is `nine tenths`, T is the lowest at which the answers have nine tenths of the largest entropy, a rule that was given up."""
from fastai.vision.all import *
from functools import lru_cache
from fastcore.script import call_parse
from sklearn.datasets import load_breast_cancer,load_digits,load_wine,make_classification
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.model_selection import train_test_split
from fastkd.all import *
from fastkd.test_utils import *
from defaults import cifar10_dls,cifar10_net
import ast,sysconfig

def new_learner(dls, make_model, seed):
    set_seed(seed, reproducible=True)
    dls.train.rng = random.Random(seed)
    multi = dls.train.dataset[0][1].is_floating_point()
    return Learner(dls, make_model(), loss_func=BCEWithLogitsLossFlat() if multi else CrossEntropyLossFlat(), metrics=accuracy_multi if multi else accuracy)

class NoValid(Callback):
    def before_validate(self): raise CancelValidException

def fit(learn, n, *cbs):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, 1e-2, cbs=[*cbs, NoValid()])
    return learn

def rows_dls(x, y, trn, val, bs=32):
    "`DataLoaders` of inputs and their labels"
    ds = Datasets(list(range(len(x))), [[x.__getitem__],[y.__getitem__]], splits=(L(list(map(int, trn))),L(list(map(int, val)))))
    return ds.dataloaders(bs=bs, val_bs=1024, dl_type=MemoryDL, num_workers=0, drop_last=False)

def mlp(n_in, hidden, c, p=0.): return nn.Sequential(nn.Linear(n_in, hidden), nn.ReLU(), nn.Dropout(p), nn.Linear(hidden, c))

def few(trn, y, n, seed):
    "`n` of the training rows, stratified"
    return trn if n is None else train_test_split(trn, train_size=n, stratify=y[trn], random_state=seed)[0]

# -- the works: teacher, and data, model and epochs of a seed. A student takes some two hundred steps
@lru_cache
def _digits(c=10):
    d = load_digits()
    x,y = tensor(d.images).float()[:,None]/16,tensor(d.target)%c
    return x,y,*train_test_split(range_of(y), test_size=599, stratify=d.target, random_state=0)

@lru_cache
def _digits_net(n, epochs, c):
    x,y,trn,val = _digits(c)
    return fit(new_learner(rows_dls(x, y, few(trn, y, n, 0), val, 64), partial(tiny_cnn, (32,64,128), c), 0), epochs)

def digits(seed, n=150, epochs=60, wrong=0., teacher=(None,12), c=10):
    x,y,trn,val = _digits(c)
    rows,net,y = few(trn, y, n, seed),_digits_net(*teacher, c),y.clone()
    rng = random.Random(seed)
    for i in rows:
        if rng.random()<wrong: y[i] = (y[i]+rng.randrange(1, 10))%10
    return net,rows_dls(x, y, rows, val, 64),partial(tiny_cnn, c=c),epochs

@lru_cache
def _traits():
    x,y,trn,val = _digits()
    y = torch.stack([y%2==0, y>4, (y==0)|(y==6)|(y>7)], 1).float()
    return fit(new_learner(rows_dls(x, y, trn, val, 64), partial(tiny_cnn, (32,64,128), 3), 0), 12),x,y
def traits(seed):
    net,x,y = _traits()
    trn,val = _digits()[2:]
    return net,rows_dls(x, y, few(trn, _digits()[1], 150, seed), val, 64),partial(tiny_cnn, c=3),60

@lru_cache
def _tables(nm):
    if nm=='made up': x,y = make_classification(6000, 30, n_informative=12, n_redundant=6, n_classes=8, n_clusters_per_class=3, flip_y=.05, class_sep=1.2, random_state=0)
    elif nm in ('docstrings','modules'): x,y = docstrings(nm=='modules')
    else: x,y = {'tumours':load_breast_cancer,'wine':load_wine}[nm](return_X_y=True)
    if nm not in ('docstrings','modules'): x = (x-x.mean(0))/x.std(0)
    trn,val = train_test_split(range_of(y), test_size=1/3 if len(y)<1000 else .2, stratify=y, random_state=0)
    return tensor(x).float(),tensor(y).long(),trn,val

@lru_cache
def _table_net(nm, hidden, epochs):
    x,y,trn,val = _tables(nm)
    return fit(new_learner(rows_dls(x, y, trn, val, 64), partial(mlp, x.shape[1], hidden, int(y.max())+1, .5), 0), epochs)

def table(seed, nm, n, hidden, width, epochs, bs=32, teacher=10):
    x,y,trn,val = _tables(nm)
    return _table_net(nm, hidden, teacher),rows_dls(x, y, few(trn, y, n, seed), val, bs),partial(mlp, x.shape[1], width, int(y.max())+1),epochs

areas = dict(asyncio='asyncio', email='email mailbox imaplib smtplib', files='tarfile zipfile pathlib shutil tempfile gzip os',
    numbers='_pydecimal fractions statistics numbers random', testing='unittest doctest', web='http urllib wsgiref xmlrpc ftplib')
def docstrings(modules=False):
    "Which part of Python is a docstring from, or which of its larger modules? Its first 20 words as a bag"
    lib,rows = Path(sysconfig.get_path('stdlib')),set()
    groups = 'asyncio email unittest _pydecimal tarfile urllib wsgiref tkinter multiprocessing logging importlib idlelib'.split() if modules else areas.values()
    for i,ms in enumerate(groups):
        for f in [f for m in ms.split() for f in sorted((lib/m).rglob('*.py')) or [lib/f'{m}.py'] if f.exists()]:
            for n in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
                if isinstance(n, (ast.Module,ast.ClassDef,ast.FunctionDef,ast.AsyncFunctionDef)) and (d:=ast.get_docstring(n)): rows.add((' '.join(re.findall('[a-z]+', d.lower())[:20]),i))
    df = pd.DataFrame([o for o in sorted(rows) if o[0].count(' ')>4]).drop_duplicates(0)
    return CountVectorizer(min_df=4, binary=True).fit_transform(df[0]).toarray(),df[1].to_numpy()

def cifar10(seed, folder): return cifar10_net(folder),cifar10_dls(folder, 1500, seed+1),partial(tiny_cnn, (8,16,32), ch=3),8

works = {'digits, 150 labels':digits, 'digits, all labels':partial(digits, n=None, epochs=10), 'digits, a third of labels wrong':partial(digits, n=600, epochs=20, wrong=1/3),
    'digits, poor teacher':partial(digits, n=600, epochs=20, teacher=(100,6)), 'traits, 150 labels':traits,
    'tumours, 40 labels':partial(table, nm='tumours', n=40, hidden=100, width=8, epochs=60, bs=16), 'wine, 24 labels':partial(table, nm='wine', n=24, hidden=64, width=4, epochs=60, bs=8),
    'made up, 400 labels':partial(table, nm='made up', n=400, hidden=256, width=16, epochs=15), 'docstrings, 300 labels':partial(table, nm='docstrings', n=300, hidden=128, width=8, epochs=20, teacher=4),
    # these two were run for the first time when a rule for T had been made on the nine above, which they refuted
    'odd or even, 100 labels':partial(digits, n=100, c=2), 'modules, 400 labels':partial(table, nm='modules', n=400, hidden=128, width=8, epochs=15, teacher=4),
    'CIFAR-10, 1500 labels':cifar10}
grid = {f'T={T:g} alpha={a}':(T,a) for T in (1.,2.,4.,8.,16.) for a in (.1,.5,.9)}
grid['T=5 alpha=0.5'] = (5.,.5) # the default

def validated(learn):
    with learn.no_bar(): return learn.validate()[1]

@call_parse
def main(
    only:str='', # Data sets to work on, separated by semicolons; empty: all
    folder:str=None, # Where CIFAR-10 lies; without it that data set is left out
    n_seeds:int=5, # Runs of each setting
    again:bool=False, # Throw the rows of `suggested` away first?
    out:str=str(Path(__file__).parent/'find.csv') # Results, one row a run
):
    "Train small students alone, with each T and alpha of a grid, and with what `kd_find` suggests"
    torch.set_num_threads(1)
    df = pd.read_csv(out) if Path(out).exists() else pd.DataFrame(columns=['data','setting','seed','accuracy','T','alpha'])
    if again: df = df[df.setting!='suggested'].reset_index(drop=True)
    done = set(zip(df.data, df.setting, df.seed))
    def add(data, setting, seed, acc, T=np.nan, alpha=np.nan):
        df.loc[len(df)] = [data,setting,seed,acc,T,alpha]
        df.to_csv(out, index=False, float_format='%.5g')
        print(f'{data:32} seed {seed} {setting:16} {acc:.4f}  T {T:g} alpha {alpha:g}', flush=True)
    for data,work in works.items():
        if (only and data not in only.split(';')) or (data.startswith('CIFAR') and folder is None): continue
        if data.startswith('CIFAR'): work = partial(work, folder=Path(folder))
        for seed in range(n_seeds):
            todo = [o for o in ('student alone',*grid,'suggested','nine tenths') if (data,o,seed) not in done]
            if not todo: continue
            teacher,dls,make_model,epochs = work(seed)
            if (data,'teacher',0) not in done and seed==0: add(data, 'teacher', 0, validated(teacher))
            with tempfile.TemporaryDirectory() as tmp:
                # each item is asked about once: all students of a seed read the same answers
                store = precompute_targets(teacher, dls, Path(tmp)/'s', bar=noop)
                for nm in todo:
                    learn = new_learner(dls, make_model, seed)
                    if nm=='student alone': add(data, nm, seed, validated(fit(learn, epochs)))
                    else:
                        if nm in grid: T,a = grid[nm]
                        else:
                            T,a = found = kd_find(learn, teacher, show=False)
                            e = found.by_T.entropy
                            if nm=='nine tenths': T = e.index[e>=.9][0]
                        # a suggestion that is on the grid has been run
                        ran = df[(df.data==data)&(df.seed==seed)&(df.setting==f'T={T:g} alpha={a}')].accuracy
                        if nm not in grid and len(ran):
                            add(data, nm, seed, ran.iloc[0], T, a)
                            continue
                        add(data, nm, seed, validated(fit(learn, epochs, KnowledgeDistillation(store, T=T, alpha=a, log=False))), T, a)
