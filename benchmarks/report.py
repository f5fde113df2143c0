"RESULTS.md, its plots and RESULTS.json, from the files that the parts have written: no number comes from anywhere else"
import json
from pathlib import Path
import numpy as np, pandas as pd

parts = 'step at peers store dense losses scale processes imports grad_share'.split()
csvs = 'losses methods defaults targets small_data find'.split()

def read(d):
    "By name: what each part has written, if it has"
    res = {k:json.loads((d/f'{k}.json').read_text()) for k in parts if (d/f'{k}.json').is_file()}
    # those without are of before there was this page
    return {**{k:o for k,o in res.items() if 'machine' in o}, **{f'{k}.csv':pd.read_csv(d/f'{k}.csv') for k in csvs if (d/f'{k}.csv').is_file()}}

def at(o, *path):
    "`o[path[0]][path[1]]...`, None where there is nothing"
    for k in path:
        if not isinstance(o, dict) or k not in o: return None
        o = o[k]
    return o

def clock(data, part): return 'wall' if at(data, part, 'machine', 'gpu') else 'cpu'

# -- words
def num(x, n=3): return '' if x is None else f'{x:,.0f}' if abs(x)>=1000 else f'{x:.{n}f}'
def span(r): return 'not run' if r is None else f'{r[0]:.3f} ({r[1]:.3f}-{r[2]:.3f})'
def grid(head, rows):
    "A table in markdown"
    if not rows: return 'not run'
    line = lambda o: '| '+' | '.join('' if v is None else str(v) for v in o)+' |'
    return '\n'.join([line(head), '|'+'---|'*len(head), *map(line, rows)])

# -- the budgets of the design: what, against what, at most, value with its interval
def budgets(data):
    c = {k:clock(data, k) for k in parts}
    step = lambda w,k: at(data, 'step', 'works', w, c['step'], k)
    with_ci = lambda w,k: None if step(w, k) is None else [step(w, k),*step(w, f'{k}_ci')]
    st = lambda *p: at(data, 'store', *p, 'ratio', c['store'])
    saved = [r['saved_ratio'] for r in (at(data, 'step', 'works') or {}).values()]
    ci = at(data, 'imports', 'libraries', 'fastkd', 'ratio')
    sum_,same = 'the same step without distillation + the bare teacher','the same fastai step without distillation'
    rows = [('a step with a live teacher, resnet34→18 at 64 px', sum_, 1.03, with_ci('resnet', 'ratio')),
        ('the same, nets of a few ms (digits)', sum_, 1.10, with_ci('digits', 'ratio')),
        ('the same, ms of our own', sum_, .5, with_ci('digits', 'own_ms')),
        ('a step with stored targets, resnet18 at 64 px', same, 1.03, st('step', 'resnet')),
        ('the same, digits', same, 1.15, st('step', 'digits')),
        ('a step with two feature terms (AT), resnet34→18', 'a bare loop with the same two hooks', 1.05, at(data, 'at', 'works', 'resnet', 'ratio', c['at'])),
        ('precompute', 'a bare teacher pass over the same DataLoader', 1.05, st('precompute')),
        ('gather of 64 stored rows, 1000 classes, fp16', '`index_select` from memory', 1.5, st('gather')),
        ('a replayed pass over augmented data', 'the same pass without replay', 1.10, st('replay')),
        ('memory kept for backward, the worst net', "student alone + the teacher's answer", 1.02, [max(saved)]*3 if saved else None),
        ('`import fastkd.all` after `fastai.vision.all`', 'that import', 1.03, ci)]
    return [dict(what=w, against=a, at_most=m, value=r, mark=mark(r, m)) for w,a,m,r in rows]

def mark(r, most):
    if r is None: return 'not run'
    res = 'met' if r[0]<=most else 'missed'
    return res+(', undecided: the interval spans the budget' if r[1]<=most<r[2] else '')

# -- sections: title, words, table
def machines(data):
    rows = []
    for k in parts:
        m = at(data, k, 'machine')
        if m: rows.append([k, m['gpu'] or m['cpu'], m['cores'], m['memory_gb'], m['python'], m['torch'], m['fastai'], m['fastkd'], m['numpy'], f"{data[k]['load']['before']:.1f} → {data[k]['load']['after']:.1f}", data[k]['date'][:16], f"{data[k]['seconds']/60:.1f}"])
    return grid(['part','processor','cores','GB','python','torch','fastai','fastkd','numpy','load','UTC','minutes'], rows)

def steps(data):
    c,rows = clock(data, 'step'),[]
    for w,r in (at(data, 'step', 'works') or {}).items():
        s = r[c]
        rows.append([w, *[num(q['median'], 2) for q in s['ms'].values()], span([s['ratio'],*s['ratio_ci']]), f"{s['own_ms']:.2f} ({s['own_ms_ci'][0]:.2f} to {s['own_ms_ci'][1]:.2f})", num(s['floor_ms'], 2), f"{r['spread']:.0%}", r['steps']])
    return grid(['work','plain','teacher','kd','bare','barekd','kd/(plain+teacher)','own ms','of a bare loop','spread','rounds'], rows)

def memory(data):
    rows = [[w, *[f"{r['saved'][k]:,}" for k in ('plain','kd','answer')], f"{r['saved_ratio']:.4f}"] for w,r in (at(data, 'step', 'works') or {}).items()]
    return grid(['work','plain, bytes','kd, bytes',"teacher's answer",'ratio'], rows)

def raced(rows, names, c):
    "Rows of `race`"
    return grid(['what',*names,'ratio','at most','rounds'], [[k, *[num(at(r, 'forms', n, c), 2) for n in names], span(r['ratio'][c]), r['target'], r['rounds']] for k,r in rows])

def stored(data):
    s,c = data.get('store', {}),clock(data, 'store')
    rows = [(f'step, {k}: {how}', r if how=='stored' else r['cached']) for k,r in s.get('step', {}).items() for how in ('stored','cached')]
    some = [(k,s[k]) for k in ('gather','precompute','replay') if k in s]
    t = [[k, *[num(v[c], 3) for v in r['forms'].values()][:2], span(r['ratio'][c]), r['target'], r['rounds']] for k,r in some]
    res = [raced(rows, ['plain','stored','cached'], c), grid(['what','without, ms','with, ms','ratio','at most','rounds'], t)]
    if 'cache' in s: res.append(raced([('ten epochs with `cache`', s['cache'])], ['plain','teacher','cached'], c))
    b = pd.DataFrame(s.get('bytes', []))
    return '\n\n'.join(res+[grid(['kind','classes','bytes per item','as float32'], [[r.kind, r.classes, f'{r.bytes:.1f}', r.raw] for r in b.itertuples()])])

def features(data):
    c = clock(data, 'at')
    rows = [[w, *[num(r['forms'][k][c], 2) for k in ('bare','fastai','fastkd')], span(r['ratio'][c]), span(r['over_fastai'][c])] for w,r in (at(data, 'at', 'works') or {}).items()]
    return grid(['work','bare loop, ms','fastai callback, ms','fastkd, ms','over the loop','over the callback'], rows)

def peers(data):
    c,rows = clock(data, 'peers'),[]
    for w,r in (at(data, 'peers', 'works') or {}).items():
        rows += [[w, k, num(r['forms'][k][c], 2), 'fastai step' if k.startswith('fast') else 'bare step', span(v[c]), f"{r['memory'][k]:.3f}"] for k,v in r['ratio'].items()]
    return grid(['work','library','ms','over teacher +','ratio','memory for backward'], rows)

def dense(data):
    c = clock(data, 'dense')
    rows = [[k, '×'.join(map(str, r['shape'])), *[num(f[c], 1) for f in r['forms'].values()], span(r['ratio'][c]), *[f'{m/2**20:,.0f}' for m in r['memory'].values()], f"{r['memory']['lean']/r['memory']['plain']:.3f}"] for k,r in (at(data, 'dense', 'works') or {}).items()]
    return grid(['work','shape','plain, ms','fastkd, ms','ratio','plain, MB','fastkd, MB','memory ratio'], rows)

def imports(data):
    rows = [[k, f"{r['fastai_s']:.2f}", f"{r['own_s']*1e3:,.0f}", span(r['ratio'])] for k,r in (at(data, 'imports', 'libraries') or {}).items()]
    heavy = at(data, 'imports', 'libraries', 'fastkd', 'heavy') or {}
    return grid(['library','fastai.vision.all, s','then, ms','ratio'], rows)+('\n\nHeaviest, ms by themselves: '+', '.join(f'{k} {v:.1f}' for k,v in heavy.items())+'.' if heavy else '')

def stores(data):
    s = at(data, 'scale', 'stores') or {}
    rows = [[f"{r['items']:,}", *[num(v, 2) for v in r['us'].values()], f"{r['memory_mb']:.0f}", f"{r['disk']:.0f}"] for r in s.get('rows', [])]
    if rows: rows.append(['**slope**', *[num(v, 2) for v in s['slopes'].values()], '', ''])
    return grid(['items',*(f'{k}, µs' for k in (s.get('slopes') or {})),'memory, MB','bytes on disk'], rows)

def classes(data):
    s = at(data, 'scale', 'losses')
    if not s: return 'not run'
    df = pd.DataFrame(s['rows'])
    ms,mem = [df.pivot(index='loss', columns='classes', values=k) for k in ('ms','memory')]
    left = lambda k,c: 'left out' if k in s['skipped'] and c>=s['skipped'][k] else ''
    rows = [[k, *[num(r[c], 2) if pd.notna(r[c]) else left(k, c) for c in ms], num(s['slopes'][k], 2), ' '.join(f'{v:.1f}' for v in mem.loc[k].dropna())] for k,r in ms.loc[list(s['slopes'])].iterrows()]
    return grid(['loss',*(f'{c:,}, ms' for c in ms),'slope','memory, × logits, by classes'], rows)

def processes(data):
    rows = [[k, f"{r['one']:,.1f}", f"{r['two']:,.1f}", span(r['gain'])] for k,r in (at(data, 'processes', 'kinds') or {}).items()]
    return grid(['what','one process, items/s','two, items/s','gain'], rows)

def shares(data):
    c = clock(data, 'grad_share')
    return grid(['work','without, ms','every step measured, ms','cost of a step, part'], [[w, num(r['forms']['off'][c]), num(r['forms']['every'][c]), f"{r['cost'][c][0]:.2%} ({r['cost'][c][1]:.2%} to {r['cost'][c][2]:.2%})"] for w,r in (at(data, 'grad_share', 'works') or {}).items()])

def between_layers(data):
    df = data.get('losses.csv')
    if df is None: return 'not run'
    df = df[df.part!='at']
    rows = [[d, p, len(g), f'{np.exp(np.log(g.ratio).mean()):.3f}', f'{g.ratio.min():.2f}-{g.ratio.max():.2f}', (g.high<1).sum(), (g.low>1).sum(), ', '.join(f'{r.loss} {r.ratio:.2f}' for r in g.nlargest(3, 'ratio').itertuples())] for (d,p),g in df.groupby(['device','against'])]
    return grid(['device','against','cases','mean ratio','range','faster','slower','slowest'], rows)

# -- what was learned: gains over a baseline, seed by seed
def gains(df, group, name, base, value='accuracy', most=None, keep=()):
    "Mean gain over the row `base` of the same group and seed: the best, and those to `keep`"
    res = []
    for g,d in df.groupby(group, sort=False):
        t = d.pivot_table(index='seed', columns=name, values=value)
        if base not in t: continue
        gain = t.sub(t[base], axis=0).drop(columns=base).dropna(axis=1, how='all')
        best = gain.mean().sort_values(ascending=False, kind='stable')
        best = best[(best.rank(ascending=False, method='first')<=(most or len(best)))|best.index.isin(keep)].index
        label = ', '.join(map(str, g)) if isinstance(g, tuple) else g
        res.append([label, base, f'{t[base].mean():.3f} ± {t[base].std():.3f}', '', t[base].count()])
        res += [[label, k, f'{t[k].mean():.3f} ± {t[k].std():.3f}', f'{gain[k].mean():+.3f} ± {gain[k].std():.3f}', gain[k].count()] for k in best]
    return grid(['data','setting',value,'gain','seeds'], res)

def learned(data, k):
    df = data.get(f'{k}.csv')
    if df is None: return 'not run'
    if 'setting' in df: df = df[df.setting!='teacher']
    if k=='methods': df = df[df.method!='teacher'].assign(way=lambda d: (d.method+' '+d.setting).where(d.setting!='-', d.method))
    if k=='methods': return gains(df, 'data', 'way', 'student alone', most=5, keep=['kd alpha=.5'])
    if k=='find': return gains(df[df.setting!='nine tenths'], 'data', 'setting', 'student alone', most=1, keep=['suggested','T=4 alpha=0.5'])
    if k=='small_data': return gains(df, ['data','part'], 'way', 'labels alone', 'student')
    if k=='targets': return '\n\n'.join(gains(df[aug], 'data', 'setting', b) for aug,b in ((~df.setting.str.startswith('augmented'),'student alone'),(df.setting.str.startswith('augmented'),'augmented: student alone')))
    return gains(df, 'data', 'setting', 'student alone', most=5, keep=['kd T=4.0 alpha=0.5'])

sections = [('The machine', 'One thread; `load` is that of the machine before and after the part.', machines),
    ('A step with a live teacher', 'Milliseconds, medians. `own ms` is what `kd` takes beyond `plain+teacher`, of which a bare loop takes the next column (`barekd-bare-teacher`). A 1.00 of the ratio is the limit.', steps),
    ('Memory kept for backward', 'Bytes of the storages that autograd keeps during a step, parameters left out.', memory),
    ('Beside the peers', 'The same formula (`answers`), or with two attention terms (`features`), in one process. `torchdistill` is its loss in a bare loop, `box` its `DistillationBox`. Each is judged against the step it is built on and the bare teacher; the last column is against what that step and the answer keep.', peers),
    ('Two attention terms', 'All of fastai is in the first ratio; the second is ours alone.', features),
    ('Stored targets', 'Milliseconds of a step, or of a pass.', stored),
    ('Large answers', '`kd_loss` beside the KL divergence as one writes it: forward and backward pass.', dense),
    ('The losses between layers', '`plain`: the same formula without any care; `torchdistill`: its own classes. A case is a loss at a size; `faster` and `slower` count those whose interval lies below or above 1.', between_layers),
    ('Items', "Microseconds of CPU time per item, of a store of 1000 classes. `slope` is that of the time of all items on log axes: 1 is proportional. `memory` is the process's own, beyond that before.", stores),
    ('Classes', 'Milliseconds of CPU time, forward and backward pass, 64 items. `slope` is that from 1000 classes on: 1 is proportional.', classes),
    ('One process and two', 'On the clock; 2 is the ideal gain.', processes),
    ('Import', 'CPU time of fresh interpreters.', imports),
    ("The columns of `log='grad'`", 'Milliseconds of a step; a step is measured once in 16.', shares)]
learning = dict(methods='Which method? The best of each data set', defaults='Which loss, temperature and weight? The best of each data set', targets='Where the answers come from', small_data='Few labels', find='What `kd_find` suggests, and a grid')

def accuracy(d):
    "What accuracy_report.py says of its rows, and its picture"
    if not (d/'accuracy.csv').is_file(): return ['not run']
    from accuracy_report import markdown,tables
    return [markdown(tables(d/'accuracy.csv')).strip()]+['![accuracy](accuracy.png)']*(d/'accuracy.png').is_file()

def markdown(d):
    "All of RESULTS.md"
    data = read(d)
    quick = [k for k in parts if at(data, k, 'quick')]
    res = ['# Results', '`python -m benchmarks` writes this page from the files beside it; README.md says what each part measures and how to read it. Brackets are 95% bootstrap intervals over rounds.']
    if quick: res.append(f"> Of a **quick** run: {', '.join(quick)}. It proves that these parts run; its numbers decide nothing.")
    res += ['## Budgets', grid(['what','against','at most','measured','budget'], [[b['what'], b['against'], b['at_most'], span(b['value']), b['mark']] for b in budgets(data)])]
    pic = lambda k: [f'![{k}](plots/{k}.png)'] if (d/f'plots/{k}.png').is_file() else []
    res += pic('budgets')
    shown = {'Beside the peers':'peers', 'Items':'items', 'Classes':'classes'}
    for title,words,f in sections: res += [f'## {title}', words, f(data), *pic(shown.get(title))]
    res += ['## Accuracy', *accuracy(d)]
    for k,title in learning.items(): res += [f'## {title}', f"From {k}.csv: mean over seeds ± their spread; gains are over the first row, seed by seed. The best of many settings look better than they are.", learned(data, k)]
    return '\n\n'.join(res)+'\n'

def write(d):
    "Plots, RESULTS.md and RESULTS.json"
    from plots import draw
    data = read(d)
    draw(data, budgets(data), d/'plots')
    (d/'RESULTS.md').write_text(markdown(d))
    (d/'RESULTS.json').write_text(json.dumps(dict(budgets=budgets(data), parts={k:{o:data[k].get(o) for o in ('machine','load','date','seconds','quick')} for k in parts if k in data}), indent=1)+'\n')
