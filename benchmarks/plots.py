"The pictures of RESULTS.md"
import matplotlib
matplotlib.use('agg')
import matplotlib.pyplot as plt, numpy as np, pandas as pd

def _save(fig, to):
    # few colours: a picture takes a tenth of the room
    from PIL import Image
    fig.savefig(to, dpi=90, bbox_inches='tight', metadata={'Software':None})
    plt.close(fig)
    Image.open(to).convert('RGB').quantize(32).save(to, optimize=True)

def budgets(rows, to):
    rows = [r for r in rows if r['value']][::-1]
    if not rows: return
    v,lo,hi = np.array([r['value'] for r in rows]).T/np.array([r['at_most'] for r in rows])
    fig,ax = plt.subplots(figsize=(7,.35*len(rows)+.8))
    cols = ['tab:green' if r['mark'].startswith('met') else 'tab:red' for r in rows]
    ax.errorbar(v, range(len(v)), xerr=[(v-lo).clip(0),(hi-v).clip(0)], fmt='none', ecolor=cols)
    ax.scatter(v, range(len(v)), c=cols)
    ax.axvline(1, c='k', lw=.8)
    ax.set_yticks(range(len(v)), [r['what'].replace('`','') for r in rows])
    ax.set_xlabel('measured / at most')
    _save(fig, to/'budgets.png')

def peers(d, to):
    ws = d['works']
    fig,axs = plt.subplots(1, len(ws), figsize=(3*len(ws),2.6), sharey=True)
    for ax,(w,r) in zip(np.atleast_1d(axs), ws.items()):
        m = np.array([o['cpu'] for o in r['ratio'].values()])
        ax.bar(list(r['ratio']), m[:,0], yerr=[m[:,0]-m[:,1],m[:,2]-m[:,0]], color=['tab:blue',*['tab:gray']*(len(m)-1)])
        ax.axhline(1, c='k', lw=.8)
        ax.set_title(w)
        ax.tick_params(axis='x', rotation=35)
    np.atleast_1d(axs)[0].set_ylabel('time / (step + teacher)')
    _save(fig, to/'peers.png')

def items(s, to):
    fig,(a,b) = plt.subplots(1, 2, figsize=(8,3))
    df = pd.DataFrame([dict(items=r['items'], **r['us']) for r in s['rows']]).set_index('items')
    df.plot(loglog=True, marker='o', ms=3, ax=a, ylabel='µs per item')
    b.loglog(df.index, [max(r['memory_mb'], .1) for r in s['rows']], marker='o', ms=3)
    b.set(xlabel='items', ylabel='memory, MB', ylim=(1,None))
    _save(fig, to/'items.png')

def classes(s, to):
    df = pd.DataFrame(s['rows'])
    fig,axs = plt.subplots(1, 2, figsize=(9,3.6))
    for ax,k,lab in zip(axs, ('ms','memory'), ('µs per item','memory, × logits')):
        t = df.pivot(index='classes', columns='loss', values=k)*(1e3/s['items'] if k=='ms' else 1)
        for i,c in enumerate(s['slopes']): ax.loglog(t.index, t[c], marker='.', label=c, color=plt.cm.tab20(i%20), lw=2 if c in ('plain','kd') else 1)
        ax.set(xlabel='classes', ylabel=lab)
    axs[1].legend(fontsize=7, ncol=2, bbox_to_anchor=(1,1))
    _save(fig, to/'classes.png')

def draw(data, rows, to):
    to.mkdir(exist_ok=True)
    for o in to.glob('*.png'): o.unlink()
    budgets(rows, to)
    if 'peers' in data: peers(data['peers'], to)
    s = data.get('scale', {})
    if 'stores' in s: items(s['stores'], to)
    if 'losses' in s: classes(s['losses'], to)
