"""Tables and a picture of the rows of accuracy.csv; needs none of the peers."""
from pathlib import Path
import matplotlib.pyplot as plt, pandas as pd
from fastkd.verdict import paired_stats

csv = Path(__file__).with_name('accuracy.csv')
cols = ['data','setting','seed','accuracy','seconds','cpu','weight','error']
# what their users get when they say nothing, or copy the configuration for such data
peers = 'fasterai','torchdistill'

def rows(out=csv):
    df = pd.read_csv(out) if Path(out).is_file() else pd.DataFrame(columns=cols)
    return df.drop_duplicates(['data','setting','seed'])

def gain(df, a, b):
    "Percent that setting `a` is above `b` on the seeds that both have, with its interval; None: nothing to compare"
    d = df.pivot(index='seed', columns='setting', values='accuracy')
    if a==b or a not in d or b not in d: return
    s = paired_stats(100*(d[a]-d[b]).dropna())
    return s if s['n'] else None
def shown(s): return '' if s is None else f"{s['diff']:+.2f} [{s['lo']:+.2f}, {s['hi']:+.2f}]" if s['lo']==s['lo'] else f"{s['diff']:+.2f}"
def mean_sd(o): return f'{100*o.mean():.1f}'+(f' ± {100*o.std():.1f}' if len(o)>1 else '')

def one_table(d, ok):
    "All settings of a data set"
    res = pd.DataFrame([{'student':nm, 'seeds':str(len(o)), 'accuracy':mean_sd(o.accuracy), 'above the student alone':shown(gain(ok, nm, 'student alone')),
        "above fastkd's default":shown(gain(ok, nm, 'fastkd')), 'CPU s':f'{o.cpu.median():.3g}'} for nm,o in ok.groupby('setting', sort=False)])
    no = d[d.error.notna()].drop_duplicates('setting')
    return pd.concat([res, pd.DataFrame([dict(student=o.setting, accuracy='cannot run', **{'above the student alone':o.error}) for o in no.itertuples()])]).fillna('').set_index('student')

def duel(ok, nm='fastkd'):
    "Setting `nm` against that peer's default which is best on the seeds that both have"
    found = [(s['diff'],p,s) for p in peers if (s:=gain(ok, nm, p))]
    if not found: return {}
    _,p,s = min(found)
    word = 'above' if s['diff']>0 else 'below' if s['diff']<0 else 'equal'
    return {'best peer':p, 'difference':shown(s), 'seeds':s['n'], 'verdict':word+(', within noise' if s['diff'] and s['lo']<=0<=s['hi'] else '')}

def tables(out=csv):
    "Title -> table: the defaults, other defaults that were tried, and each data set"
    df,per,duels,others = rows(out),{},{},{}
    for data,d in df.groupby('data', sort=False):
        ok = d[(d.setting!='teacher')&d.accuracy.notna()]
        teacher = d[d.setting=='teacher'].accuracy
        per[data+(f' (teacher {100*teacher.iloc[0]:.1f})' if len(teacher) else '')] = one_table(d, ok)
        if (o:=duel(ok)): duels[data] = {"fastkd's default":mean_sd(ok[ok.setting=='fastkd'].accuracy), **o}
        for nm in ok.setting.unique():
            if nm.startswith('fastkd T='): others[data,nm] = {"above fastkd's default":shown(gain(ok, nm, 'fastkd')), **{f'above {p}':shown(gain(ok, nm, p)) for p in peers}}
    res = {"The defaults, in percent, with 95% intervals over seeds":pd.DataFrame(duels).T.rename_axis('data'), **per}
    return {**res, 'Other defaults':pd.DataFrame(others).T.rename_axis(['data','student']).reset_index().set_index('data')} if others else res

def markdown(ts):
    def line(o): return '| '+' | '.join(map(str, o))+' |'
    def lines(t): return [line(t.columns), line('---' for _ in t.columns), *map(line, t.fillna('').itertuples(index=False))]
    return '\n\n'.join('\n'.join([f'### {k}', '', *lines(t.reset_index())]) for k,t in ts.items())+'\n'

def picture(out=csv, ncols=3):
    "Gains on the student alone with their 95% intervals, of three seeds or more: the default, other methods of fastkd, peers"
    df = rows(out)
    df = df[(df.setting!='teacher')&df.accuracy.notna()&~df.setting.str.contains('=')]
    n = df.data.nunique()
    fig,axs = plt.subplots(-(-n//ncols), ncols, figsize=(3.4*ncols,3.2*-(-n//ncols)), layout='constrained', squeeze=False)
    for ax in axs.flat[n:]: ax.axis('off')
    for ax,(data,d) in zip(axs.flat, df.groupby('data', sort=False)):
        g = {nm:s for nm in d.setting.unique() if (s:=gain(d, nm, 'student alone')) and s['n']>2}
        g = {k:g[k] for k in sorted(g, key=lambda k: (k!='fastkd', not k.startswith('fastkd'), k))}
        for i,(nm,s) in enumerate(g.items()):
            ax.errorbar(s['diff'], -i, xerr=s['hi']-s['diff'], fmt='o', color='C0' if nm=='fastkd' else 'C7' if nm.startswith('fastkd') else 'C1')
        ax.axvline(0, color='k', lw=.8)
        ax.set(yticks=[-i for i in range(len(g))], xlabel='above the student alone, points')
        ax.set_title(data, fontsize=9)
        ax.set_yticklabels(list(g), fontsize=8)
    return fig

def draw(out=csv):
    "The picture beside the rows"
    fig = picture(out)
    fig.savefig(Path(out).with_suffix('.png'), dpi=100)
    plt.close(fig)
