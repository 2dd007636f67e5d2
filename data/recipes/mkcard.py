import json,os,re,sys,csv
from pathlib import Path
L=lambda p:[json.loads(l) for l in open(p)] if os.path.exists(p) else []
K=("replace","remove","add","move","swap","background")
table={(r['steps'],r['scale']):r for r in L('/tmp/w/n/table.jsonl')}; words=L('/tmp/w/n/words.jsonl'); plus=L('/tmp/w/n/plus.jsonl')
DEF=float(sys.argv[2])
s=open('/tmp/w/n/card.md').read()
rows=["| instructions | guidance | edits | "+" | ".join(K)+" | draw | open |","|---"*11+"|"]
SC=(1,1.5,2,3,5)
for sc in SC:
    if (20,sc) not in table: continue
    r=table[20,sc]; b='**' if sc==DEF else ''
    rows.append(f"| {b}as trained{b} | {'none' if sc==1 else format(sc,'g')} | {r['edits_per_cent']} | "+" | ".join(str(r['right'][k]) for k in K)+f" | {r['right']['draw']} | {r['right']['open']} |")
for r in words:
    n=r['rows']; pc=lambda k:round(100*r['right'][k]/n)
    e=round(sum(r['right'][k] for k in K)*100/(6*n),1)
    rows.append(f"| {r['words']} | {r['scale']:g} | {e} | "+" | ".join(str(pc(k)) for k in K)+f" | {pc('draw')} | |")
s=s.replace('{DEFAULTS}',"\n".join(rows))
t=["| | steps | "+" | ".join("none" if c==1 else f"{c:g}" for c in SC)+" |","|---"*7+"|"]
for what in ('edits','draw','open'):
    for st in (1,2,4,8,20):
        def v(c):
            r=table.get((st,c))
            if not r: return '?'
            return f"{r['edits_per_cent']:.0f}" if what=='edits' else str(r['right'][what])
        t.append(f"| {what if st==1 else ''} | {st} | "+" | ".join(v(c) for c in SC)+" |")
s=s.replace('{TABLE}',"\n".join(t))
p=["| instructions | guidance | combine |","|---|---|---|"]
for r in plus: p.append(f"| {r['words']} (of {r['rows']}) | {r['scale']:g} | {r['edits_per_cent']:.0f} |")
s=s.replace('{PLUS_TABLE}',"\n".join(p))
T=Path('/work/swap/data/tiny')
vae=list(csv.DictReader(open(T/'log_vae.csv')))[-1]; tr=list(csv.DictReader(open(T/'log_transformer.csv')))[-1]
s=s.replace('{VAE_MIN}',f"{float(vae['minutes']):.0f}").replace('{TR_MIN}',f"{float(tr['minutes']):.0f}").replace('{SAMPLES}',f"{int(tr['samples']):,}").replace('{EIGHTH}',f"{int(tr['samples'])//8:,}")
from safetensors import safe_open
with safe_open(T/'edit_plus_lora.safetensors','pt') as f: n=sum(f.get_tensor(k).numel() for k in f.keys())
s=s.replace('{PLUS_N}',f"{n:,}").replace('{PLUS_MB}',f"{(T/'edit_plus_lora.safetensors').stat().st_size/1e6:.1f}")
s=s.replace('{TOTAL}',f"{sum(p.stat().st_size for p in T.rglob('*.safetensors'))/1e6:.1f}").replace('{SCALE}',f'{DEF:g}')
if (20,DEF) in table: s=s.replace('{DRIFT}',str(table[20,DEF]['drift_mean'])).replace('{DRIFT99}',str(table[20,DEF]['drift_99']))
diff=[r['different'] for r in L('/tmp/w/n/variety.jsonl') if 'different' in r]
if diff: s=s.replace('{VARIETY}',', '.join(map(str,diff[0])))
for k,v in json.loads(open('/tmp/w/n/card_texts.json').read()).items(): s=s.replace('{'+k+'}',v)
open(sys.argv[1],'w').write(s)
print(re.findall(r'\{[A-Z_0-9]+\}',s)); print("\n".join(rows)); print("\n".join(t)); print("\n".join(p)); print(diff)
