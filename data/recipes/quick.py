import sys,json; sys.path.insert(0,'data/recipes')
from evaluate import *
import math
torch.set_num_threads(2)
pipe=QwenImagePipeline.from_pretrained("data/tiny")
rows=int(sys.argv[1]); print(pipe.schedule)
for shift,scale in [tuple(map(float,a.split(','))) for a in sys.argv[2:]]:
    if shift: pipe.schedule=dict(pipe.schedule,base_shift=math.log(shift),max_shift=math.log(shift))
    print(shift,scale,json.dumps(count(pipe,rows,(*KINDS,'draw','open'),WORLD,20,scale)),flush=True)
