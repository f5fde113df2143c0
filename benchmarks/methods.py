"""Which method? The same student, data order and schedule under every registered loss, several seeds, two data sets.

    python benchmarks/methods.py                                    # digits, 5 seeds
    python benchmarks/methods.py --data cifar10 --folder cifar10    # CIFAR-10 as a folder of images, train/CLASS/*.jpg and test/CLASS/*.jpg
    python benchmarks/methods.py --cost                             # the time of a step under each method, in methods_cost.csv

Weights. Response losses: `alpha=.5`, all else as in the loss, but for `kd`, `rkl` and `jsd`, which have T=4 (the default of all three when these ran). Everything else is a `Term` beside the whole task loss (`alpha=0, task_weight=1`), as
- `recipe`: the weight of the paper, or of the CIFAR-100 or ImageNet recipe of RepDistiller or torchdistill, where one is known;
- `matched`: the weight with which the term's gradient at the student's weights is as long as the task's, mean over the batches of an epoch before the first step;
- `kd + matched`: the same weight, beside plain KD (T=4, `alpha=.5`).
Schemes (`fit_...`, one call each) keep their own weights, and train as many epochs in all as the others: those of a paraphraser or of a teacher's head count.

The time of a step is CPU time of one thread, teacher included; the methods of a round are timed in random order, a plain fit after every four.

Each row of methods.csv is one run; rows that are there already are not run again."""
from fastai.vision.all import *
from fastcore.script import call_parse
from copy import deepcopy
from fastkd.all import *
from defaults import digits,cifar10

works = dict(digits=digits, cifar10=cifar10)
epochs = dict(digits=60, cifar10=12)
T = 4.
responses = 'kd dkd nkd wsld ofa dist lskd mlkd ttm skd_instance mse_logits hard rkl jsd abkd wkd'.split()

# layers of `tiny_cnn`: three blocks, their outputs before the ReLU, the pooled vector
blocks,before_relu,last_map,vector = ['0','1','2'],['0.1','1.1','2.1'],'2','4'

def parts(n, share): return (max(1, round(n*share)), n-max(1, round(n*share)))

# epochs in proportion to those of the papers, roughly
schemes = {
    'fit_fitnet': lambda learn,t,n,**kw: fit_fitnet(learn, t, '1', '1', parts(n,.25), 1e-2, **kw),
    'fit_fsp': lambda learn,t,n,**kw: fit_fsp(learn, t, blocks, blocks, parts(n,.25), 1e-2, **kw),
    'fit_ab': lambda learn,t,n,**kw: fit_ab(learn, t, blocks, blocks, parts(n,.25), 1e-2, **kw),
    'fit_ft': lambda learn,t,n,**kw: fit_ft(learn, t, last_map, last_map, parts(n,.1), 1e-2, **kw),
    'fit_kta': lambda learn,t,n,**kw: fit_kta(learn, t, last_map, last_map, parts(n,.1), 1e-2, **kw),
    'fit_pad': lambda learn,t,n,**kw: fit_pad(learn, t, vector, vector, parts(n,.75), 1e-2, **kw),
    'fit_sskd': lambda learn,t,n,**kw: fit_sskd(learn, t, vector, vector, parts(n,.25), 1e-2, **kw),
    # without KD on the turned images, which the teachers have never seen
    'fit_sskd w_tf=0': lambda learn,t,n,**kw: fit_sskd(learn, t, vector, vector, parts(n,.25), 1e-2, loss=SSKDLoss(w_tf=0.), **kw),
    'fit_simkd': lambda learn,t,n,**kw: fit_simkd(learn, t, n, 1e-2, **kw)}

class ClassMaps(nn.Module):
    "Class activation maps by a head that stays part of its own model"
    def __init__(self, head): super().__init__(); self.head = (head,)
    def forward(self, x): return class_maps(x, self.head[0])

def class_map_term(loss, s, t): return Term(loss, last_map, last_map, adapter=Adapter(ClassMaps(s[-1]), ClassMaps(t[-1])))

@torch.no_grad()
def centers(t, dls):
    xs,ys = zip(*dls.train.new(shuffle=False))
    with no_random(): return class_centers(t[:5].eval()(torch.cat(xs).as_subclass(Tensor)), torch.cat(ys).as_subclass(Tensor))

def both(loss, layers, **kw): return lambda s,t,dls: Term(loss() if callable(loss) else loss, layers, layers, **kw)

# term from student, teacher and data; weight of its recipe, None where none is known to us
methods = {
    'hint': (both('hint', '1'), 100.),
    'hidden': (both('hidden', ['1','2']), None),
    'at': (both('at', blocks), None),
    'at code': (both(partial(ATLoss, mode='code'), blocks), 1000.),
    'attention': (both('attention', blocks), None),
    'nst': (both('nst', blocks), 50.),
    'affinity': (both('affinity', last_map), None),
    'ickd': (both(partial(ICKDLoss, mode='torchdistill'), last_map), 500.),
    'fsp': (both('fsp', blocks), None),
    'ab': (both('ab', before_relu), None),
    'ofd': (lambda s,t,dls: Term(OFDLoss(margin=[ofd_margin(t[i][1]) for i in range(3)], weights=(.25,.5,1)), before_relu, before_relu), 1e-3),
    'wkd_feat': (both('wkd_feat', last_map), None),
    'catkd': (lambda s,t,dls: class_map_term('catkd', s, t), None),
    'dist_plus': (lambda s,t,dls: class_map_term('dist_plus', s, t), None),
    'vid': (both('vid', blocks), 1.),
    'reviewkd': (both('reviewkd', blocks), 1.),
    'mgd': (lambda s,t,dls: Term(MGDLoss(mgd_generator(t[2][0].out_channels)), last_map, last_map), 1.),
    'srd': (both('srd', last_map), 1.),
    'nd': (lambda s,t,dls: Term(NDLoss(centers(t, dls)), vector, vector), None),
    'rkd': (both(partial(RKDLoss, 25., 50.), vector), 1.),
    'sp': (both('sp', last_map), 3000.),
    'pkt': (both(partial(PKTLoss, mode='torchdistill'), vector), 30000.),
    'cc': (both(partial(CCLoss, mode='torchdistill'), vector), .003),
    'cka': (both('cka', vector), None),
    'skd_direction': (lambda s,t,dls: Term('skd_direction'), None),
    # as large a part of the items as 16384 of ImageNet-scale recipes' 50,000
    'crd': (lambda s,t,dls: Term(CRDLoss(k=len(dls.train_ds)//3), vector, vector), .8)}

class Kept(nn.Module):
    "A block whose outputs for the items of the batch are known"
    def __init__(self, net): super().__init__(); self.net,self.maps,self.rows = net,[],None
    def forward(self, x): return self.net(x) if self.rows is None else self.maps[self.rows]

class KeptTeacher(nn.Sequential):
    "A `tiny_cnn` that runs once per training item (there are no random transforms), with the layers where they were"
    @torch.no_grad()
    def __init__(self, net, dls):
        net = deepcopy(net).eval()
        super().__init__(*[nn.Sequential(nn.Identity(), Kept(nn.Sequential(*o[:2])), o[2]) for o in net[:3]], *net[3:])
        with no_random(): xs = torch.cat([b[0] for b in dls.train.new(shuffle=False)]).as_subclass(Tensor)
        blocks = list(self)[:3]
        self.kept,self.row = [o[1] for o in blocks],{self.key(x):i for i,x in enumerate(xs)}
        for x in xs.split(64):
            for b in blocks:
                b[1].maps.append(b[1](x))
                x = b[2](b[1].maps[-1])
        for o in self.kept: o.maps = torch.cat(o.maps)
    def key(self, x): return hash(x.numpy().tobytes())
    def forward(self, x):
        rows = [self.row.get(self.key(o)) for o in x.as_subclass(Tensor)]
        for o in self.kept: o.rows = None if None in rows else tensor(rows)
        return super().forward(x)

class GradNorm(Callback):
    "Mean norm of the student's gradient over an epoch, without a step"
    def before_fit(self): self.norms = []
    def before_step(self):
        self.norms.append(torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]).norm().item())
        raise CancelStepException

class NoValid(Callback):
    def before_validate(self): raise CancelValidException

def new_learner(dls, make_model, seed):
    set_seed(seed, reproducible=True)
    dls.train.rng = random.Random(seed)
    return Learner(dls, make_model(), metrics=accuracy)

def fit(learn, n, *cbs):
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(n, 1e-2, cbs=[*cbs, NoValid()])
    return learn

def distil(teacher, learn, nm, weight=1., **kw):
    term = methods[nm][0](learn.model, teacher[1], learn.dls)
    term.weight = weight
    return KnowledgeDistillation(teacher[0], T=T, terms=term, log=False, **kw)

def matched_weight(new, teacher, nm):
    "Weight that makes the term's gradient as long as the task's"
    task,term = new(),new()
    a,b = GradNorm(),GradNorm()
    fit(task, 1, a); fit(term, 1, distil(teacher, term, nm, alpha=0, task_weight=0), b)
    return float(f'{np.mean(a.norms)/np.mean(b.norms):.2g}')

# pairs (method, setting)
settings = [('student alone','-'), ('fit_simkd alone','-'), *((o,'alpha=.5') for o in responses), *((k,'matched') for k in methods),
    *((k,'recipe') for k,(_,w) in methods.items() if w is not None), *((k,'scheme') for k in schemes), *((k,'kd + matched') for k in methods)]

def run(new, teacher, nm, setting, n, weight=1.):
    "Train one student"
    learn = new()
    if nm=='fit_simkd alone': # the net that SimKD makes of the student is larger: here it learns from labels alone
        head = teacher[1][-1]
        projector = SimKDProjector(learn.model[-1].in_features, head.in_features)
        learn.model = nn.Sequential(learn.model[:3], projector, *learn.model[3:5], nn.Linear(head.in_features, head.out_features))
    if setting=='-': return fit(learn, n)
    if setting=='alpha=.5': return fit(learn, n, KnowledgeDistillation(teacher[0], nm, T=T if nm in ('kd','rkl','jsd') else None, alpha=.5, log=False))
    if setting=='scheme':
        with learn.no_bar(), learn.no_logging(): schemes[nm](learn, teacher[0], n, cbs=NoValid())
        return learn
    return fit(learn, n, distil(teacher, learn, nm, weight, **(dict(alpha=.5) if setting=='kd + matched' else dict(alpha=0, task_weight=1))))

class StepTimer(Callback):
    "CPU time from batch to batch, of every fit of every Learner"
    order,run_valid,fits = -100,False,[]
    def before_train(self): self.fits.append([]); self.t = None
    def before_batch(self):
        t = time.thread_time()
        if self.t is not None: self.fits[-1].append((t-self.t)*1e3)
        self.t = t

# epochs of a scheme (of a method a quarter), rounds
timing = dict(digits=(16,5), cifar10=(4,1))

def time_steps(new, teacher, n, rounds):
    "Milliseconds of a step: one row per method, setting and round"
    kinds,rows = [o for o in settings if o[1] not in ('-','recipe','kd + matched')],[]
    defaults.callbacks.append(StepTimer)
    for r in range(rounds):
        todo = random.Random(r).sample(kinds, len(kinds))
        for i in range(0, len(todo), 4):
            for nm,setting in (*todo[i:i+4], ('student alone','-')):
                StepTimer.fits.clear()
                run(partial(new, r), teacher, nm, setting, n if setting=='scheme' else n//4)
                # stages of different cost count as often as they step
                rows.append([nm,setting,r,np.average([np.median(o) for o in StepTimer.fits], weights=[len(o) for o in StepTimer.fits])])
        print(f'round {r}', flush=True)
    defaults.callbacks.remove(StepTimer)
    return pd.DataFrame(rows, columns=['method','setting','round','ms'])

def write_cost(data, folder, out):
    teacher,make_dls,make_model,_ = works[data](folder, 0)
    df = time_steps(partial(new_learner, make_dls(), make_model), (teacher.model,teacher.model), *timing[data])
    # beside the plain steps of the same round, so that a change of the clock speed cancels
    plain = df[df.method=='student alone'].groupby('round').ms.median()
    df['ratio'] = df.ms/df['round'].map(plain)
    df = df.groupby(['method','setting'], sort=False)[['ms','ratio']].median().reset_index()
    df.insert(0, 'data', data)
    old = pd.read_csv(out) if Path(out).exists() else df[:0]
    pd.concat([old[old.data!=data],df]).to_csv(out, index=False, float_format='%.4g')
    print(df.sort_values('ratio').to_string(index=False))

@call_parse
def main(
    data:str='digits', # 'digits' or 'cifar10'
    folder:str=None, # Where CIFAR-10 lies
    n_seeds:int=5, # Runs of each setting
    only:str='', # Settings to run, separated by commas: '-' (the student alone), 'alpha=.5', 'matched', 'recipe', 'scheme', 'kd + matched'; empty: all
    cost:bool=False, # Time steps instead of training students?
    out:str=str(Path(__file__).parent/'methods.csv') # Results, one row a run; times go to a file beside it
):
    "Train a small student alone and with each method; same initial weights and data order per seed"
    torch.set_num_threads(1)
    if cost: return write_cost(data, folder, Path(out).with_stem(Path(out).stem+'_cost'))
    df = pd.read_csv(out) if Path(out).exists() else pd.DataFrame(columns=['data','method','setting','seed','accuracy','weight'])
    def rows(nm, setting=''): return df[(df.data==data)&(df.method==nm)&df.setting.str.endswith(setting)]
    for seed in range(n_seeds):
        teacher,make_dls,make_model,_ = works[data](folder, seed)
        if not len(rows('teacher')): df.loc[len(df)] = [data,'teacher','-',0,teacher.validate()[1],np.nan]
        dls = make_dls()
        new,teacher = partial(new_learner, dls, make_model),(KeptTeacher(teacher.model, dls),teacher.model)
        for nm,setting in settings:
            if ((rows(nm).setting==setting)&(rows(nm).seed==seed)).any() or (only and setting not in only.split(',')): continue
            w = methods[nm][1] if setting=='recipe' else np.nan
            if 'matched' in setting:
                known = rows(nm, 'matched').weight
                w = known.iloc[0] if len(known) else matched_weight(partial(new, 0), teacher, nm)
            learn = run(partial(new, seed), teacher, nm, setting, epochs[data], w)
            with learn.no_bar(): acc = learn.validate()[1]
            df.loc[len(df)] = [data,nm,setting,seed,acc,w]
            df.to_csv(out, index=False, float_format='%.5g')
            print(f'{data} seed {seed} {nm:14} {setting:12} {acc:.4f}  weight {w:.3g}', flush=True)
