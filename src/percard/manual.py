"""What `percard VERB --help` says: each verb taught by examples."""

from __future__ import annotations

ROOT = """Turn a Hugging Face checkpoint into INT8 or INT4, check it, run it, measure it against FP16.

\b
  percard doctor                                         what serves on this machine, and what does not
  percard quantize Qwen3-8B --spec w4a16-g128 --out out/q   a folder or a hub id becomes compressed-tensors
  percard verify out/q --against Qwen3-8B --text held.txt   re-open, compare, KL and top-1 against FP16
  percard generate out/q --prompt "def add(a, b):"          let it speak
  percard bench model Qwen3-8B --specs w4a16-g128           tokens per second against FP16

\b
A spec says what a weight becomes:  w8a8  w4a16-g128  w4a8-g128  w8a16  w4a16-g64-asym ...
  wX bits of a weight, aY bits of an activation, -gN weights that share a scale, -asym with zero points.

\b
Exit codes, the same for every verb: 0 done, 1 error, 2 bad input, 3 refused by preflight or not comparable,
4 quality gate red, 5 cut but valid, 130 interrupted. Results go to stdout, progress and errors to stderr;
with --json both are JSON, one object a line. PERCARD_TRACEBACK=1 adds a traceback to an error.
"""

QUANTIZE = """Quantise the checkpoint SRC to SPEC and write it to OUT, shard by shard, in a format that others load.

\b
  percard quantize ./Qwen3-8B --spec w4a16-g128 --out out/w4                        round to nearest, no text needed
  percard quantize ./Qwen3-8B --spec w4a16-g128 --method gptq --calibration c.jsonl --out out/w4
  percard quantize ./Qwen3-8B --spec w8a8 --method smoothquant --calibration c.jsonl --text held.txt --out out/w8
  percard quantize Qwen/Qwen3-8B --spec w8a8 --out out/w8      from the hub, if huggingface_hub is installed
  percard quantize ./Qwen3-8B --spec w4a16-g128 --dry-run      what it would do and need; reads no weights
  percard quantize ./Qwen3-8B --spec w8a8 --print-recipe       the same wish as a file, to edit
  percard quantize ./Qwen3-8B --recipe mine.yaml --out out/q   per-layer specs live in a recipe

Methods: rtn and hqq need no text. gptq, awq (+ gptq), smoothquant (+ gptq) and rotate (+ gptq) run the model's blocks over
a text, one block in memory at a time; a line of the .jsonl holds {"text": ..}, {"messages": [..]} or {"ids": [..]}. With
--text the result is held against SRC on that text, and while it is red the worst layers get more bits.

SRC stays untouched. OUT must not exist, or --force. A run that is killed loses the block at work: the same command goes on.
What was written is opened again and checked before it counts.
"""

VERIFY = """Open DST again and compare it with the checkpoint it was made from.

\b
  percard verify out/w4 --against ./Qwen3-8B                    names, shapes, scales, error of every weight
  percard verify out/w4 --against ./Qwen3-8B --level bytes      names, dtypes, shapes, side files only
  percard verify out/w4 --against ./Qwen3-8B --text held.txt    KL, top-1 and perplexity; exit 4 when the gate is red
  percard verify out/w4 --against ./Qwen3-8B --text held.txt --level blocks      error of every block's output only
  percard verify out/w4 --against ./Qwen3-8B --text held.txt --kv int8,int4      and over these caches, through the engine

With a text both models run side by side, two blocks in memory at a time, in fp32. Take a text that was never used for
training; one that was calibrated on is told by its hash and makes the result red. 3-bit weights have no gate.

With --kv the engine runs DST over each cache, every position reading keys and values back as decoding does, against the same
weights over a bf16 cache (the gate) and against SRC. DST may then hold 16-bit weights, and be SRC itself.
"""

CALIBRATE_KV = """Choose a cache spec for each layer of the model in DIR: as few bytes as a KL budget allows, measured on a text.

\b
  percard calibrate-kv ./Qwen3-8B --text held.txt                     bf16, int8, k8v4 or int4 by layer, KL up to 0.002
  percard calibrate-kv ./Qwen3-8B --text held.txt --budget 0.01 --specs k8v4,int4
  percard calibrate-kv ./Qwen3-8B --text held.txt --dry-run           how much work it is
  percard generate ./Qwen3-8B --prompt "import " --kv calibrated      uses what was found

Half of the text's windows are learnt from: the mean of every key channel, which is taken off before keys are rounded, and
what each layer costs alone. The other half says what all layers cost together. Writes percard_kv.json and
percard_kv.safetensors into DIR at the end; config.json and the weights stay untouched. A run that was cut goes on.
"""

PRUNE = """Cut blocks, channels, heads or experts out of the checkpoint SRC; OUT is an ordinary model of the same family.

\b
  percard prune ./Qwen3-8B --ffn 9216 --dry-run                       what would be cut and what it saves; reads no weights
  percard prune ./Qwen3-8B --ffn 9216 --layers 32 --calibration c.jsonl --out out/child
  percard prune ./Qwen3-30B-A3B --experts 96 --calibration c.jsonl --text held.txt --out out/child
  percard prune ./Qwen3-8B --target-params 0.75 --calibration c.jsonl --out out/child
  percard prune ./Qwen3-8B --target-cost 0.7 --card h20-96 --users 32 --out out/child    by the planner's cost of a token
  percard prune ./Qwen3-8B --mask wanda --sparsity 2:4 --out out/zeros      zeros, for study: nothing gets faster

Sizes are rounded up to what stays servable when it is quantised in --group and split over --tp cards. Which parts go is decided
by what a text shows: block influence (scored again after each drop), activations of channels and heads, REAP for experts.
A dense child needs training before it serves: percard distill. Only a few experts of a mixture may go without.
"""

CAPTURE = """Write down what TEACHER says, so that students are distilled without it in memory.

\b
  percard capture ./Qwen3-8B --data mix.jsonl --top-k 64 --out out/capture        log-probabilities of a text, 394 bytes a token
  percard capture ./Qwen3-8B --data mix.jsonl --dry-run                           tokens and bytes; reads no weights
  percard capture ./Qwen3-8B --generate prompts.jsonl --n 4 --out out/written     completions of prompts, to train on
  percard capture ./Qwen3-8B --generate prompts.jsonl --keep '\\\\boxed\\{' --out out/w    only those that a regular expression finds
  percard capture ./Qwen3-8B --generate prompts.jsonl --keep 'cmd:python check.py' --top-k 64 --out out/w     both, checked

The teacher runs block by block, one block in memory. A run that is killed goes on with the same command: by file, by prompt.
OUT carries the sha256 of every file, of teacher, tokenizer and text; percard distill refuses it when any of them is another.
"""

DISTILL = """Train the checkpoint STUDENT to say what a teacher says; OUT is an ordinary checkpoint under the student's names and dtypes.

\b
  percard distill out/child --teacher ./Qwen3-8B --data mix.jsonl --dry-run       what it needs; reads no weights
  percard distill out/child --teacher ./Qwen3-8B --data mix.jsonl --tokens 2.5e9 --batch 768 --lr 1e-4 --out out/student
  percard distill out/child --teacher ./Qwen3-8B --data mix.jsonl --text held.txt --out out/student    KL before and after
  percard distill out/child --teacher T --data F --hidden cosine --hidden-blocks 7,15 --out out/student
  percard distill out/child --teacher out/capture --out out/student               from what percard capture wrote down
  percard distill out/child --teacher out/capture --teacher out/written --out out/student    from several captures together
  percard distill out/w4 --teacher ./Qwen3-8B --data F --scales-only --out out/w4-scales    scales of a quantised student; codes stay
  percard distill ./Qwen3-8B --teacher ./Qwen3-8B --data F --qad w4a16-g64 --out out/w4      GPTQ first, then codes are trained
  torchrun --nproc-per-node 8 -m percard distill out/child --teacher T --data F --out out/student      split by FSDP2

Losses: fkl (forward KL, the default), rkl, jsd with --beta, --hard W times cross-entropy beside it, hidden states. Both models
must have the same tokenizer; padding of the heads is left out on both sides. A run that is killed goes on from its last state,
every --every steps: the same command. A loss that is no number stops it, and the last state stays.
"""

RUN = """Go through the stages of RECIPE: prune, capture, distill, quantize, verify, bench; end with a table against the model.

\b
  percard run recipe.yaml --dry-run                 every stage checked before the first one starts; reads no weights
  percard run recipe.yaml                           finished stages are skipped, a killed one goes on
  percard run recipe.yaml --from quantize           that stage and all behind it again
  percard run recipe.yaml --only bench              that stage and no other
  percard run examples/prune-distil-int4.yaml       a quarter of a small model away, and INT4

\b
  model: ./Qwen3-8B
  stages:
    - prune: {target_params: 0.75}
    - distill: {teacher: source, data: mix.jsonl, tokens: 2.5e9, batch: 768, lr: 1e-4}
    - quantize: {spec: w4a16-g128, methods: [gptq]}
    - verify
    - bench
  calibration: {source: calib.jsonl}
  verify: {text: held.txt, gate: {kl: 0.05, top1: 0.9}}
  output: {dir: out}

Each stage has its folder under output.dir and its verb's own journal and report; docs/run.md has all keys. The table is run.json
and run.md: parameters, bytes, KL, top-1 and perplexity against the model, tokens/s beside it in FP16. A child whose gate is red
gets no speed, and the exit code is 4.
"""

GENERATE = """Complete a prompt with the model in DIR, FP16 or quantised.

\b
  percard generate out/w4 --prompt "def add(a, b):" --max-new 64
  percard generate out/w4 --prompt "import " --temperature 0.7 --top-p 0.9 --seed 3
  percard generate out/w4 --prompt "import " --kv int8            keys and values in 8 bits
  percard generate out/w4 --prompt "import " --kv calibrated      as percard calibrate-kv found
"""

BENCH_MODEL = """Tokens per second of whole models against FP16: prefill and decode, A B A B, with spread.

\b
  percard bench model shape:qwen3-0.6b --specs w8a8,w4a16-g64     synthetic weights at true shapes, no download
  percard bench model shape:qwen3-8b --specs w4a16-g128 --layers 4
  percard bench model ./Qwen3-8B --specs w8a8,w4a8-g128 --json    one record a line
  percard bench model shape:qwen3-0.6b --specs w4a8-g64 --kv bf16,int8,k8v4,int4 --context 1k,8k     decode over caches
  percard bench model shape:qwen3-8b --specs w8a8 --batches 1,4,16,64 --bound tpot=50ms,ttft=2s --usd-hour 2 --out r.jsonl
  percard bench model --quick                                     under two minutes; --dry-run says what would be timed

Three ratios against FP16: at the same batch, each side at its largest batch inside --bound, each side at the largest batch that fits
--memory-gb beside its weights; with both batches, and the reason where there is none. --out goes on where an earlier call ended.

FP16 is the fastest float type of torch on this machine, found by a probe and named in every row. Its cache is bf16, or of that
type. --kv gives every other side these caches, or the 16-bit weights when there are no --specs; --context steps from these depths,
filled with random keys of the scale of real ones.
"""

BENCH_OPS = """Linears of real layers against torch's floats and int8 rivals: correct first, then timed in turn, with spread.

\b
  percard bench ops                                           Qwen3-0.6B shapes on this machine
  percard bench ops --models qwen3-8b --specs w4a16-g128 --tokens 1,16,256
  percard bench ops --quick                                   under two minutes
  percard bench ops --full --out ops.jsonl                    everything; the same command goes on where it was cut

Each kernel is compared with its reference at the very shape before it is timed there. Quantising activations is inside.
"""

BENCH_LADDER = """Your own task over models, specs and caches: the score against what a million tokens costs, cheapest passing pair first.

\b
  percard bench ladder --task t.jsonl --models ./Qwen3-0.6B,./Qwen3-4B --specs bf16,w8a8,w4a16-g128 --usd-hour 1.5
  percard bench ladder --task t.jsonl --models ./Qwen3-4B,./Qwen3-4B-pruned --kv bf16,int8 --out ladder.jsonl
  percard bench ladder --task examples/tiny-qwen3/task.jsonl --models examples/tiny-qwen3 --quick

\b
A line of the task: {"prompt": "...", "expected": "...", "score": "exact" | "regex" | "choice", "choices": [..], "max_new": 32}

Each model's 16-bit self is its reference: KL, top-1, lengths of answers and the drop of the score are its gate, and a red one
has no speed. A pair passes when its score is within --task-drop of the best 16-bit score of all models. Weights are quantised
at load, round to nearest. With --out a run that was cut goes on. Exit code 4 when a gate is red.
"""

BENCH_ATTENTION = """Ops over a paged cache, each spec of it, against torch's attention over unquantised keys and values.

\b
  percard bench attention                                     decode at 32/8/128, 8k and 32k, batch 1 and 8
  percard bench attention --kv int8,int4 --context 8192 --batch 1 --heads qwen3-8b
  percard bench attention --op kv_append,gather_dequantize    what writes the cache, what unpacks a prefix
  percard bench attention --full --out attention.jsonl        everything; the same command goes on where it was cut

Compared with its reference at these heads first; then in turn with scaled_dot_product_attention, whose query heads are folded
into rows. Caches rotate, so that memory is cold. Bytes of a token are measured from the tensors.
"""

BENCH_DISTILL = """A head, a divergence from a teacher and both gradients in one (what percard distill trains with), against torch's composition.

\b
  percard bench distill                                       Qwen3-0.6B's head; 512 tokens of forward KL on a CPU
  percard bench distill --loss fkl,rkl,jsd,topk --tokens 256 --vocab 32000
  percard bench distill --tokens 4096 --rounds 1 --out distill.jsonl        what it holds at its worst moment

Compared with its reference first. torch has all logits in memory at once: where they would not fit it is left out, in words.
Liger-Kernel runs beside it on a card where it is installed.
"""

BENCH_LAYER = """One decoder layer at true shapes, 16 bits against quantised, in turn: prefill, decode, and the head beside it.

\b
  percard bench layer qwen3-1.7b --specs w8a8,w4a16-g128 --out layer.jsonl
  percard bench layer qwen3-235b-a22b --specs w4a16-g128 --shard 4:0      what one of four cards holds
  percard bench layer qwen3-8b --kv bf16,int8 --depth 1024,8192 --batch 1,16
  percard bench layer qwen3-0.6b --model-records model.jsonl              do 28 layers and a head make the model?

Weights are random and stand in as many copies as the model has layers, up to 1 GiB, so that memory is cold. A residual above
15 % between the layers and the model's step is flagged.
"""

BENCH_CARD = """The roofs of this machine, measured, as a row that `percard plan` takes: memory, products of each type, noise.

\b
  percard bench card --out card.json                    seconds on a card, a minute on a CPU
  percard plan qwen3-0.6b --card-file card.json --card cpu-intel-xeon-amx-int8-2t
  percard bench card --device cpu --id our-host --out cards.json     adds its row to a table of your own

A roof is the best body seen, torch's or percard's; which one, at which shape, stands in the row. Let nothing else run.
"""

BENCH_SERVE = """Seeded requests in waves over one pool of pages: FP16 and every spec and cache, in turn, at each concurrency.

\b
  percard bench serve --quick                           the small model of the checkout, under two minutes
  percard bench serve shape:qwen3-0.6b --specs w8a8,w4a16-g128 --kv bf16,int8 --scale 0.1 --out serve.jsonl
  percard bench serve DIR --text heldout.txt --specs w8a8 --mix code --bound ttft=2s,tpot=50ms --memory-gb 24
  percard bench serve DIR --text heldout.txt --mix lengths.jsonl     a line {"prompt": 512, "answer": 128} a request

TTFT, TPOT, gaps between tokens and ends as percentiles; tokens per second and card; requests that keep the bound; three ratios.
A wave starts when the one before has ended: continuous batching is the serving stacks' (`percard bench import`).
"""

BENCH_SLOT = """One command for a card that is free for ten minutes: agreement, ops against bf16, a model; one folder.

\b
  percard bench slot --minutes 10 --out out/slot              works from 8 minutes on; below 3 only what is essential
  percard bench slot --minutes 5 --out out/slot               the same folder again goes on where the first was cut
  percard bench slot --minutes 2 --out out/try --device cpu   try the run without a card

Exit code 0 complete, 4 a kernel disagrees with its reference, 5 cut but valid (time, SIGTERM, lost card).
"""

BENCH_COMPARE = """Two runs of the bench, or more: what became slower, faster, worse or stopped working, and how sure that is.

\b
  percard bench compare before.jsonl after.jsonl
  percard bench compare HEAD~1:bench/results/demo.jsonl out/demo --fail 5%
  percard bench compare base.jsonl a.jsonl b.jsonl                columns, the first is the base
  percard bench compare before.jsonl after.jsonl --group op --json

A cell is slower when its interval excludes 1, the change exceeds --fail and twice the noise floor, and its rank test survives
Benjamini-Hochberg over all cells. Exit code 0 no regression, 3 not comparable (card, driver, clock protocol or gate differ;
--across prints anyway and still returns 3), 4 a regression, worse quality or a red gate.
"""

BENCH_IMPORT = """Results of other programs as records, for one report and one comparison.

\b
  percard bench import vllm-serve result.json --spec w4a16-g128 --card h20-96 --cards 4 --out served.jsonl
  percard bench import sglang result.jsonl --model Qwen/Qwen3-8B --out served.jsonl
  percard bench import llama-bench result.json --out served.jsonl

Files of `vllm bench serve --save-result`, `python -m sglang.bench_serving --output-file`, `llama-bench -o json|jsonl`. What a file
does not say stays null; the flags say it. TPOT leaves the first token out: a file whose own end-to-end times show otherwise is
refused, or converted by --tpot-includes-first.
"""

BENCH_REPORT = """The tables of records that any `percard bench` verb or `demo` wrote, and with --out a page with plots.

\b
  percard bench report out/demo
  percard bench report out/demo --out out/page         report.html (one file), report.md, table.csv, plots/
  percard bench report a.jsonl b.jsonl --out out/both  several runs in one page; each is compared only with its kin
  percard bench report bench/results/demo.jsonl --readme README.md     the block between <!-- demo --> and <!-- /demo -->
"""

PLAN = """How many cards of which kind MODEL needs, in which spec, how fast and at what price: from sizes alone, no weights, no card.

\b
  percard plan qwen3-235b-a22b --card h20-96 --users 32 --ctx 8k     the fewest cards for each spec
  percard plan deepseek-r1 --card h20-96 --cards 8 --spec fp8-block   what 8 cards hold, and what they lack
  percard plan ./Qwen3-8B --card all --kv int8 --usd-hour 2           every card; exact bytes from the files
  percard plan qwen3-32b --card h100-80-sxm --tpot 25ms --ttft 2s     only what keeps these bounds
  percard plan qwen3-8b --card mycard-48 --card-file mine.json        a card of your own (docs/plan.md)
  percard plan qwen3-8b --card l20-48 --explain                       every figure with its formula and source
  percard plan --check r.jsonl --card-file mine.json --fit eff.json   predictions against records; shares for --efficiency

MODEL is a folder, a config.json, or a built-in name. Rates are predictions: two digits, with a basis and a band. Exit code 3
when nothing serves the demand.
"""

INSPECT = """Compile the Triton kernels for other cards, without a card: registers, spills, MMA kind, shared memory.

\b
  percard inspect --arch sm_80,sm_90
  percard inspect matmul_w4a16 --arch sm_90 --json
  percard inspect --all                     every kernel that the heuristics choose for real layers: minutes

Exit code 4 when the machine code is not as the op's cases.py expects: spills, another MMA, too many instructions.
"""

TUNE = """Measure which Config each op takes for real layers on this card, and write it where every later process reads it.

\b
  percard tune                                              all ops, the layers of all models that are known
  percard tune matmul_w4a16 --model qwen3-8b --minutes 10   what has an entry is skipped: go on any time
  percard tune --out kernels-of-this-card                   a folder of your own; PERCARD_TUNED names it to servers
  percard tune --dry-run                                    what would be measured; needs no card

A candidate is timed only when it does not spill and agrees with the reference. The heuristic's Config stays unless another
is better by more than noise. Nothing is ever measured at a first request. Exit code 5 when --minutes cut it.
"""

DOCTOR = """What this machine is, which body of each op serves here, and why the others refuse."""

DEMO = """The whole road on the small model that ships with the source: quantise, gate, time, one table.

\b
  percard demo                  about 8 minutes on 2 cores; writes out/demo/report.md, report.json, pareto.png
  percard demo --quick          the short one that CI runs
"""
