"""Does fastkd's default hold its own? Students alone, under the default, the best five methods, and what fasterai and torchdistill do when nothing is said.

    python benchmarks/accuracy.py                                    # digits, table, text: ten minutes on one core
    python benchmarks/accuracy.py --data few,full --folder cifar10   # CIFAR-10 as a folder of images, train/CLASS/*.jpg and test/CLASS/*.jpg
    python benchmarks/accuracy.py --table --plot                     # accuracy.md and accuracy.png from the rows that are there

Each row of accuracy.csv is one run; rows that are there already are not run again, and several processes may work on other `--data` or `--seeds` at the same time. Initial weights,
batches and schedule of a seed are the same for all settings. Peers are run where they are installed (README.md says how) and otherwise left out:
- `fasterai`: `KnowledgeDistillationCallback` of 0.4.1 with its defaults: T=5, half of the weight. `fasterai attention`: its `Attention`, weight .5.
- `torchdistill`: `KDLoss` of 1.1.5 in fastai's loop. T and the weight of the labels are those of its sample configurations: cifar10/kd (4 and .9), for text glue/sst2/kd (3 and .9).
  `torchdistill ImageNet`: those of ilsvrc2012/kd/resnet18_from_resnet34 (1 and .5). `torchdistill at` and `torchdistill vid`: weights of ilsvrc2012/at (1000, mode 'code') and /vid (1).
fastkd's methods between layers have the weight that makes their gradient at the student's first weights as long as the task's.

The teachers of CIFAR-10 run once per training item, since there are no random transforms; `cpu`, the CPU seconds of a run, then comes from 25 steps with the live teacher."""
from fastai.vision.all import *
from fastai.text.all import *
from fastai.tabular.all import *
from fastcore.script import call_parse
from functools import lru_cache
from types import SimpleNamespace
import ast,fcntl,sysconfig,tempfile
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from fastkd.all import *
from fastkd.test_utils import *
from accuracy_report import cols,csv,draw,markdown,rows,tables
from defaults import cifar10_dls,cifar10_net
from find import areas,few,new_learner,rows_dls,validated
from methods import GradNorm,KeptTeacher,StepTimer,epochs,fit,methods
from methods import works as images
from small_data import table_net
try:
    from fasterai.distill.distillation_callback import KnowledgeDistillationCallback
    from fasterai.distill.losses import Attention,SoftTarget
except ImportError: KnowledgeDistillationCallback = None
try:
    from torchdistill.core.forward_hook import ForwardHookManager
    from torchdistill.losses import mid_level as td
    from torchdistill.models.wrapper import Regressor4VID
except ImportError: td = None

maps = ['0','1','2'] # blocks of the nets for images

# -- works: teacher, the student of a seed, epochs, and what stands for the teacher where it runs only once per item
def work(teacher, new, n, ask=None): return SimpleNamespace(teacher=teacher, ask=ifnone(ask, teacher), net=ifnone(ask, teacher.model), new=new, epochs=n)
def pair(loss, layer, t_layer=None): return lambda s,t,dls: Term(loss, layer, ifnone(t_layer, layer))
image_terms = {k:methods[k][0] for k in ('vid','hidden','at','ofd')}
vector_terms = lambda *layers: {k:pair(k, *layers) for k in ('hidden','srd','pkt')}

def digits(seed, folder):
    teacher,make_dls,make_model,_ = images['digits'](folder, seed)
    return work(teacher, partial(new_learner, make_dls(), make_model), epochs['digits'])

def kept(file, make):
    "What `make` returns, made once and read from `file` in the temporary folder from then on"
    file = Path(tempfile.gettempdir())/'fastkd_accuracy'/file
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        torch.save(make(), new:=file.with_suffix(f'.{os.getpid()}'))
        new.rename(file)
    return torch.load(file, weights_only=False)

def few_labels(seed, folder):
    dls,folder = cifar10_dls(Path(folder), 1500, seed+1),Path(folder)
    teacher = new_learner(dls, partial(tiny_cnn, (32,64,128), ch=3), 0)
    teacher.model.load_state_dict(kept('few.pt', lambda: cifar10_net(folder).model.state_dict()))
    return work(teacher, partial(new_learner, dls, partial(tiny_cnn, (8,16,32), ch=3)), epochs['cifar10'], KeptTeacher(teacher.model, dls))

class Block(nn.Module):
    "Two convolutions and a way around them; the batch norm and ReLU before the first block are those of the stage before"
    def __init__(self, ni, nf, stride, pre):
        super().__init__()
        conv = partial(nn.Conv2d, bias=False)
        self.pre = nn.Sequential(nn.BatchNorm2d(ni), nn.ReLU()) if pre else nn.Identity()
        self.path = nn.Sequential(conv(ni, nf, 3, stride, 1), nn.BatchNorm2d(nf), nn.ReLU(), conv(nf, nf, 3, 1, 1))
        self.skip = nn.Identity() if ni==nf else conv(ni, nf, 1, stride)
    def forward(self, x): return self.path(self.pre(x))+self.skip(x)

def resnet(widths, n):
    "ResNet of 6n+2 layers on 16×16 maps, with the stages' outputs, those before the ReLU and the pooled vector under the names they have in `tiny_cnn`"
    stem = [nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
    def stage(i, o, s, *stem): return nn.Sequential(nn.Sequential(*stem, Block(i, o, s, False), *[Block(o, o, 1, True) for _ in range(n-1)]), nn.BatchNorm2d(o), nn.ReLU())
    a,b,c = widths
    net = nn.Sequential(stage(a, a, 1, *stem), stage(a, b, 2), stage(b, c, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))
    return net.to(memory_format=torch.channels_last)

class Normal(Transform):
    def encodes(self, x:Tensor): return ((x.float()/255-tensor([.49,.48,.45])[:,None,None])/.25).contiguous(memory_format=torch.channels_last) if x.dtype==torch.uint8 else x

def decode(folder):
    fs = [f for part in ('train','test') for f in sorted((Path(folder)/part).glob('*/*.jpg'))]
    classes = {c:i for i,c in enumerate(sorted({f.parent.name for f in fs}))}
    return torch.stack([image2tensor(PILImage.create(f)) for f in fs]),tensor([classes[f.parent.name] for f in fs])

@lru_cache
def cifar(folder):
    x,y = kept('cifar10.pt', partial(decode, folder))
    dls = rows_dls(x, y, range(50000), range(50000,60000), 128)
    for dl in dls: dl.after_batch.add(Normal())
    learn = new_learner(dls, partial(resnet, (16,32,64), 2), 0)
    learn.model.load_state_dict(kept('teacher.pt', lambda: fit(learn, 8).model.state_dict()))
    return learn,dls,KeptTeacher(learn.model, dls)
def full(seed, folder):
    learn,dls,ask = cifar(folder)
    return work(learn, partial(new_learner, dls, partial(resnet, (8,16,32), 1)), 4, ask)

@lru_cache
def tumours():
    df = load_breast_cancer(as_frame=True).frame
    trn,val = train_test_split(range_of(df), test_size=1/3, stratify=df.target, random_state=0)
    x = df.columns[:30]
    df[x] = (df[x]-df[x].iloc[trn].mean())/df[x].iloc[trn].std()
    dls = lambda rows: TabularPandas(df, [], [], list(x), 'target', CategoryBlock(), splits=(L(*rows),L(*val))).dataloaders(bs=16, val_bs=512, drop_last=False)
    return fit(table_net(dls(trn), True, 0), 20),dls,trn,df.target.to_numpy()
def table(seed, folder):
    teacher,dls,trn,y = tumours()
    return work(teacher, partial(table_net, dls(few(trn, y, 40, seed)), False), 60)

def classifier(dls, seed, emb=16, hid=24, layers=1):
    set_seed(seed, reproducible=True)
    dls.train.rng = random.Random(seed)
    config = {**awd_lstm_clas_config, 'emb_sz':emb, 'n_hid':hid, 'n_layers':layers}
    return text_classifier_learner(dls, AWD_LSTM, config=config, pretrained=False, drop_mult=.3, lin_ftrs=[32], metrics=accuracy)
@lru_cache
def docs():
    "First 20 words of the docstrings of the standard library, and the area that each is from"
    lib,rows = Path(sysconfig.get_path('stdlib')),set()
    for area,f in [(a,f) for a,ms in areas.items() for m in ms.split() for f in sorted((lib/m).rglob('*.py')) or [lib/f'{m}.py'] if f.exists()]:
        for n in ast.walk(ast.parse(f.read_text(encoding='utf-8'))):
            if isinstance(n, (ast.Module,ast.ClassDef,ast.FunctionDef,ast.AsyncFunctionDef)) and (d:=ast.get_docstring(n)): rows.add((' '.join(re.findall('[a-z]+', d.lower())[:20]),area))
    df = pd.DataFrame([o for o in sorted(rows) if o[0].count(' ')>4], columns=['text','area']).drop_duplicates('text', ignore_index=True)
    trn,val = train_test_split(range_of(df), test_size=1/6, stratify=df.area, random_state=0)
    def dls(rows, vocab=None, bs=32):
        block = TextBlock.from_df('text', tok=BaseTokenizer(), rules=[], n_workers=0, vocab=vocab)
        part = pd.concat([df.iloc[rows].assign(is_valid=False),df.iloc[val].assign(is_valid=True)], ignore_index=True)
        return DataBlock((block,CategoryBlock(vocab=list(areas))), get_x=ColReader('text'), get_y=ColReader('area'), splitter=ColSplitter()).dataloaders(part, bs=bs, val_bs=256, num_workers=0)
    return fit(classifier(dls(trn, bs=64), 0, 64, 96, 2), 5),dls,trn,df.area.to_numpy()
def text(seed, folder):
    teacher,dls,trn,y = docs()
    return work(teacher, partial(classifier, dls(few(trn, y, 300, seed), teacher.dls.vocab[0])), 8)

# name, terms between layers, temperature of torchdistill's configuration for such data, and what makes the work of a seed
works = {'digits':('digits, 150 labels', image_terms, 4., digits), 'table':('tumours, 40 labels', vector_terms('layers.0', 'layers.1'), 4., table),
    'text':('docstrings, 300 labels', vector_terms('1.layers.0'), 3., text), 'few':('CIFAR-10, 1500 labels', image_terms, 4., few_labels),
    'full':('CIFAR-10, 50000 labels', image_terms, 4., full)}

# -- what the students are taught by: a work and a new student's Learner -> callbacks
class TorchDistill(Callback):
    "Losses of torchdistill and its hooks in fastai's loop; the teacher is in eval mode and has no gradients, which torchdistill leaves to its configuration"
    order,run_valid = -1,False
    def __init__(self, teacher, loss, layers=(), t_layers=(), weight=0.): store_attr()
    def before_fit(self):
        self.teacher.eval()
        self.hooks = [ForwardHookManager('cpu') for _ in range(2)]
        for h,m,ls in zip(self.hooks, (self.model,self.teacher), (self.layers,self.t_layers)):
            for l in ls: h.add_hook(m, l, requires_input=False)
    def after_loss(self):
        with torch.no_grad(): t = self.teacher(*self.xb)
        s_io,t_io = [{'.':{'output':(o[0] if isinstance(o, tuple) else o).as_subclass(Tensor)}, **h.pop_io_dict()} for h,o in zip(self.hooks, (self.pred,t))]
        loss = self.loss(s_io, t_io, self.y.as_subclass(Tensor).flatten().long())
        # KDLoss has the labels' loss in it, the others stand beside it
        self.learn.loss_grad = self.learn.loss_grad+self.weight*loss if self.weight else loss
        self.learn.loss = self.learn.loss_grad.clone()
    def after_fit(self):
        for h in self.hooks: h.clear()

class Regressed(nn.Module):
    "A student with torchdistill's regressors beside its blocks, as its `VariationalDistributor4VID` has them"
    def __init__(self, net, teacher):
        super().__init__()
        self.net,c = net,[[o[1].num_features for o in m[:3]] for m in (net,teacher)]
        self.regs = nn.ModuleList(Regressor4VID(i, o, o, 1e-5, 5.) for i,o in zip(*c))
    def forward(self, x):
        for i,o in enumerate(self.net):
            x = o(x)
            if self.training and i<3: self.regs[i](x)
        return x

def io(path): return dict(io='output', path=path)
def td_kd(w, learn, T, labels): return TorchDistill(w.net, td.KDLoss('.', 'output', '.', 'output', T, labels))
def td_at(w, learn): return TorchDistill(w.net, td.ATLoss({o:dict(student=io(o), teacher=io(o), weight=1) for o in maps[1:]}), maps[1:], maps[1:], 1000.)
def td_vid(w, learn):
    learn.model,regs = Regressed(learn.model, w.teacher.model),[f'regs.{o}' for o in maps]
    return TorchDistill(w.net, td.VIDLoss({o:dict(student=io(f'regs.{o}'), teacher=io(o), weight=1) for o in maps}), regs, maps, 1.)

def kd(w, learn, *args, **kwargs): return KnowledgeDistillation(w.ask, *args, log=False, **kwargs)
def term(w, learn, make, weight=1., **kwargs):
    t = make(learn.model, w.teacher.model, learn.dls)
    t.weight = weight
    return kd(w, learn, terms=t, alpha=0, **kwargs)
def settings(terms, T):
    "Name -> what makes the callbacks, of a work and a new student's Learner"
    res,layers = {'student alone':lambda w,learn: [], 'fastkd':kd, **{f'fastkd {k}':partial(term, make=o) for k,o in terms.items()}, 'fastkd nkd':partial(kd, loss='nkd')},'at' in terms
    if not layers: res['fastkd dist'] = partial(kd, loss='dist')
    if KnowledgeDistillationCallback is not None:
        res['fasterai'] = lambda w,learn: KnowledgeDistillationCallback(w.net, SoftTarget)
        if layers: res['fasterai attention'] = lambda w,learn: KnowledgeDistillationCallback(w.net, Attention, maps, maps)
    if td is not None:
        res.update({'torchdistill':partial(td_kd, T=T, labels=.9), 'torchdistill ImageNet':partial(td_kd, T=1., labels=.5)})
        if layers: res.update({'torchdistill at':td_at, 'torchdistill vid':td_vid})
    return res
def candidate(nm):
    "Another default to try: 'fastkd T=8 alpha=0.5', 'torchdistill T=4 labels=.5'"
    kw = {k:float(v) for k,v in re.findall(r'(T|alpha|labels)=(\S+)', nm)}
    if not kw: raise ValueError(f"no setting {nm!r} for this data set; where it is a peer's, is that installed?")
    return partial(td_kd if nm.startswith('torch') else kd, **kw)

# -- runs
class Stop(Callback):
    def __init__(self, n): self.n = n
    def after_batch(self):
        if self.training and self.iter+1>=self.n: raise CancelFitException

def matched(w, make):
    "Weight that makes the term's gradient as long as the task's, mean over the first 40 batches or an epoch"
    (a,b),(task,learn) = (GradNorm(),GradNorm()),(w.new(0),w.new(0))
    fit(task, 1, a, Stop(40)); fit(learn, 1, b, Stop(40), make(w, learn, task_weight=0))
    return float(f'{np.mean(a.norms)/np.mean(b.norms):.2g}')

def live_cpu(w, make, seed, steps=25):
    "CPU seconds of a run with the live teacher, of a few steps"
    live,learn = SimpleNamespace(**{**vars(w), 'ask':w.teacher, 'net':w.teacher.model}),w.new(seed)
    cbs = L(make(live, learn))
    StepTimer.fits.clear()
    fit(learn, 1, Stop(steps), StepTimer(), *cbs)
    return np.median(StepTimer.fits[-1])/1e3*len(learn.dls.train)*w.epochs

def run(w, make, seed):
    "Accuracy, seconds, CPU seconds"
    learn = w.new(seed)
    cbs = L(make(w, learn))
    t,c = time.perf_counter(),time.process_time()
    fit(learn, w.epochs, *cbs)
    t,c = time.perf_counter()-t,time.process_time()-c
    acc = validated(learn)
    return dict(accuracy=acc, seconds=t, cpu=c) if w.ask is w.teacher else dict(accuracy=acc, cpu=live_cpu(w, make, seed))

def add(out, **row):
    with open(out, 'a') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        pd.DataFrame([row], columns=cols).to_csv(f, index=False, header=f.tell()==0, float_format='%.5g')
    print(*row.values(), flush=True)

@call_parse
def main(
    data:str='digits,table,text', # Data sets, separated by commas: digits, table, text, few, full
    folder:str=None, # Where CIFAR-10 lies, for few and full
    seeds:str='0,1,2,3,4', # Runs of each setting
    only:str='', # Settings to run, separated by commas; empty: all
    also:str='', # Further settings, such as 'fastkd T=8 alpha=0.5'
    table:bool=False, # Write accuracy.md from the rows instead of training?
    plot:bool=False, # Draw accuracy.png from them?
    out:str=str(csv) # Results, one row a run
):
    "Train small students alone, with fastkd and with its peers; same initial weights and data order per seed"
    torch.set_num_threads(1)
    if table: Path(out).with_suffix('.md').write_text(markdown(tables(out)))
    if plot: draw(out)
    if table or plot: return
    keys = data.split(',')
    if not works.keys()>=set(keys): raise ValueError(f"`data` names some of {', '.join(works)}, got {data!r}")
    if folder is None and {'few','full'}&set(keys): raise ValueError("few and full need `--folder`, where CIFAR-10 lies as train/CLASS/*.jpg and test/CLASS/*.jpg")
    for key in keys:
        nm,terms,T,make = works[key]
        makers = settings(terms, T)
        makers = {k:makers.get(k) or candidate(k) for k in [*(only.split(',') if only else makers), *also.split(',')] if k}
        for seed in map(int, seeds.split(',')):
            df = rows(out)
            df = df[df.data==nm]
            # what cannot run is tried once
            done = set(df.setting[(df.seed==seed)|df.error.notna()])
            if not makers.keys()-done: continue
            w = make(seed, folder)
            if not (df.setting=='teacher').any(): add(out, data=nm, setting='teacher', seed=0, accuracy=validated(w.teacher))
            for k,maker in makers.items():
                if k in done: continue
                row = dict(data=nm, setting=k, seed=seed)
                if k.removeprefix('fastkd ') in terms:
                    known = df.weight[df.setting==k]
                    row['weight'] = known.iloc[0] if len(known) else matched(w, maker)
                    maker = partial(maker, weight=row['weight'])
                try: row.update(run(w, maker, seed))
                except Exception as e:
                    if k.startswith('fastkd'): raise
                    row['error'] = f'{type(e).__name__}: {str(e).splitlines()[-1].strip()}'
                add(out, **row)
