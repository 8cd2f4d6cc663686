"""What llama.cpp's programs take and `ggmq run` and `ggmq serve` do not have: each named with what holds here instead."""

from __future__ import annotations

from config.commandline import Foreign

_SAMPLERS = "the samplers here are --temp, --top-k, --top-p, --min-p and --repeat-penalty; leave it out"
_WEIGHTS = "weights lie in the memory of the workers, whatever it says"
_DRAFT = "how many tokens are guessed follows from what it brings"
_TEXT_ONLY = "models here read text only; leave it out"
_ROPE = "what the file says about positions holds; leave it out"
_ADAPTERS = "merge it into the model first; leave it out here"
_GRAMMAR = "answers cannot be bound to a grammar here; leave it out"
_TEMPLATE = "the template of the model's file is the one that is used; --raw uses none"
_THINKING = "--reasoning on|off is what can be said about thinking"
_FIGURES = "figures go to standard error at the end; 2>/dev/null hides them"
_LOG = "what is said goes to standard error; GGMQ_DEBUG=1 says more"
_PINNING = "--pin keeps each thread on a CPU of its own"
_PLACES = "whole layers are placed: -ngl, --tensor-split and --rpc say where"
_FIT = "what does not fit is refused with the bytes that it needs; -c and --rpc change that"
_CHAT_ONLY = "leave -p out to chat"

_ROWS = (
    # names, whether a value follows, whether it may be there, what holds here, values with which it says nothing
    ("-fa --flash-attn", "maybe", True, "attention is computed in blocks, with or without it", ("on", "auto", "1")),
    ("--jinja", "none", True, "", ()),
    ("--no-jinja", "none", False, "templates are rendered as Jinja; leave it out, or use none with --raw", ()),
    ("--warmup --no-warmup --simple-io --display-prompt", "none", True, "", ()),
    ("--mlock --mmap --no-mmap -dio --direct-io -ndio --no-direct-io --no-host", "none", True, _WEIGHTS, ()),
    ("-lm --load-mode", "one", True, _WEIGHTS, ("auto",)),
    ("--repack", "none", True, "", ()),
    ("-nr --no-repack", "none", True, "weights are packed when they are loaded, with or without it", ()),
    ("-ub --ubatch-size", "one", True, "-b says how many tokens of a prompt go at once", ()),
    ("-tb --threads-batch", "one", True, "-t says it for prompts too", ()),
    ("-C --cpu-mask -Cr --cpu-range -Cb --cpu-mask-batch -Crb --cpu-range-batch", "one", False, _PINNING, ()),
    ("--cpu-strict --cpu-strict-batch", "one", True, _PINNING, ("0",)),
    ("--prio --prio-batch", "one", True, "`nice` starts a command with another priority", ("0",)),
    ("--poll --poll-batch", "one", True, "`worker --spin-us` says how long a worker looks out for work", ("50",)),
    ("--numa", "one", True, "`numactl` starts a command on a node; " + _PINNING, ()),
    ("-kvo --kv-offload", "none", True, "", ()),
    ("-nkvo --no-kv-offload", "none", False, "the KV cache of a layer lies with its weights; leave it out", ()),
    ("--swa-full -dt --defrag-thold", "maybe", True, "the KV cache is laid out by the model alone", ()),
    ("-np --parallel", "one", False, "a run answers one conversation; `ggmq bench --streams` runs several", ("1",)),
    ("--keep", "one", False, "a chat keeps its system message and drops its oldest turns; -c makes room", ("0",)),
    ("--no-context-shift", "none", True, "", ()),
    ("--context-shift", "none", False, "a chat drops its oldest turns instead; -c makes the context larger", ()),
    ("-ctxcp --ctx-checkpoints --swa-checkpoints -cram --cache-ram", "one", True, "one conversation is kept", ()),
    ("--list-devices", "none", False, "`ggmq worker --device` lists them", ()),
    ("-ot --override-tensor -mg --main-gpu -ncmoe --n-cpu-moe", "one", False, _PLACES, ()),
    ("-cmoe --cpu-moe", "none", False, _PLACES, ()),
    ("-sm --split-mode", "one", False, _PLACES, ("layer",)),
    ("--op-offload --no-op-offload", "none", True, "an op runs where its layer is", ()),
    ("-fit --fit", "maybe", True, _FIT, ("on",)),
    ("-fitt --fit-target -fitc --fit-ctx", "one", True, _FIT, ()),
    ("--check-tensors", "none", True, "what a worker stores is held against its hash, always", ()),
    ("--override-kv", "one", False, "keys are those of the file; change them there", ()),
    ("--lora --lora-scaled --control-vector --control-vector-scaled --control-vector-layer-range", "one", False,
     _ADAPTERS, ()),
    ("-mu --model-url -dr --docker-repo", "one", False, "download it and give it with -m, or use -hf", ()),
    ("-hff --hf-file", "one", False, "name its type instead: -hf USER/REPO:QUANT", ()),
    ("-hft --hf-token", "one", False, "set HF_TOKEN in the environment", ()),
    ("-cl --cache-list", "none", False, "`ggmq cache list` shows the weights that are kept", ()),
    ("--log-disable --no-perf --perf --show-timings --no-show-timings", "none", True, _FIGURES, ()),
    ("-v --verbose --log-verbose --log-prefix --no-log-prefix --log-timestamps --no-log-timestamps", "none", True, _LOG, ()),
    ("-lv --verbosity --log-verbosity --log-colors", "one", True, _LOG, ()),
    ("--log-file -o --output --output-file", "one", False, "send it there with > or 2>", ()),
    ("-co --color", "maybe", True, "text is printed without colours", ("off", "auto")),
    ("--verbose-prompt", "none", False, "`ggmq tokenize` shows the tokens of a text", ()),
    ("-sp --special", "none", False, "special tokens are not printed; `ggmq tokenize` shows them", ()),
    ("-bf --binary-file", "one", False, "-f takes any file as it is", ()),
    ("-i --interactive -if --interactive-first -ins --instruct -cml --chatml", "none", False, _CHAT_ONLY, ()),
    ("-mli --multiline-input", "none", False, "send several lines as one prompt with -f FILE or through a pipe", ()),
    ("-r --reverse-prompt", "one", False, "an answer ends with the model's own end token, or after -n tokens", ()),
    ("--in-prefix --in-suffix --chat-template --chat-template-file --chat-template-kwargs", "one", False, _TEMPLATE, ()),
    ("--in-prefix-bos --skip-chat-parsing --no-prefill-assistant", "none", False, _TEMPLATE, ()),
    ("--no-skip-chat-parsing", "none", True, "", ()),
    ("--reasoning-format", "one", False, "thoughts stay in the text; leave it out", ("none",)),
    ("--reasoning-effort --reasoning-budget-message", "one", False, _THINKING, ("default",)),
    ("--reasoning-budget", "one", False, _THINKING, ("-1",)),
    ("--reasoning-preserve --no-reasoning-preserve", "none", False, _THINKING, ()),
    ("--samplers --sampler-seq --sampling-seq -l --logit-bias --adaptive-decay --mirostat-lr --mirostat-ent", "one", False,
     _SAMPLERS, ()),
    ("--presence-penalty --frequency-penalty --mirostat --xtc-probability --dry-multiplier --dynatemp-range", "one", False,
     _SAMPLERS, ("0",)),
    ("--typical --typical-p --dynatemp-exp", "one", False, _SAMPLERS, ("1",)),
    ("--top-nsigma --top-n-sigma --adaptive-target", "one", False, _SAMPLERS, ("-1",)),
    ("--xtc-threshold --dry-base --dry-allowed-length --dry-penalty-last-n --dry-sequence-breaker", "one", False,
     _SAMPLERS, ()),
    ("-bs --backend-sampling", "none", True, "the largest logits are picked on the worker already", ()),
    ("--grammar --grammar-file -j --json-schema -jf --json-schema-file", "one", False, _GRAMMAR, ()),
    ("--rope-scaling --rope-scale --rope-freq-base --rope-freq-scale --yarn-orig-ctx --yarn-ext-factor --yarn-attn-factor "
     "--yarn-beta-slow --yarn-beta-fast -gan --grp-attn-n -gaw --grp-attn-w", "one", False, _ROPE, ()),
    ("-mm --mmproj -mmu --mmproj-url --image --audio --video --image-min-tokens --image-max-tokens", "one", False,
     _TEXT_ONLY, ()),
    ("--no-mmproj --no-mmproj-auto --no-mmproj-offload", "none", True, "", ()),
    ("--draft --draft-n --draft-max --draft-min --draft-n-min --draft-p-min --draft-p-split --spec-draft-n-max "
     "--spec-draft-n-min", "one", True, _DRAFT, ()),
    ("-td --threads-draft -ngld --gpu-layers-draft --n-gpu-layers-draft -devd --device-draft -ctkd --cache-type-k-draft "
     "-ctvd --cache-type-v-draft", "one", True, "a draft model lies whole on one device", ()),
    ("-hfd -hfrd --hf-repo-draft", "one", False, "get it with `ggmq pull` and name its file with --spec-draft-model", ()),
    ("--spec-type", "one", False, "--spec auto|ngram|draft|off says how tokens are guessed", ()),
    ("-lcs --lookup-cache-static -lcd --lookup-cache-dynamic", "one", False,
     "tokens are looked up in the prompt and the text; leave it out", ()),
    ("--spec-default", "none", True, "", ()),
    ("--slot-save-path", "one", False, "--prompt-cache DIR keeps what is read of all texts", ()),
    ("--prompt-cache-all", "none", True, "answers are kept as prompts are", ()),
    ("--prompt-cache-ro", "none", False, "what is read is kept; leave it out, or leave --prompt-cache out", ()),
    ("--server-base --host --port", "one", False, "this is no server; `--broker` and `--rpc` name what runs elsewhere", ()),
)  # fmt: skip

RUN = {
    name: Foreign(story, value, taken, neutral) for names, value, taken, story, neutral in _ROWS for name in names.split()
}
"""Options that `ggmq run` is told about by people who know llama-cli."""

_REQUEST = "a request says it; leave it out here"
_ONE_SERVER = "one `ggmq serve` has several models: -m FILE for each"
_SERVER_ROWS = (
    ("--metrics --slots --props -cb --cont-batching --webui --ui --jinja --prefill-assistant", "none", True, "", ()),
    ("--kv-unified -kvu --no-kv-unified -no-kvu", "none", True, "pages of the KV cache are shared by all slots", ()),
    ("-nocb --no-cont-batching", "none", False, "batching is continuous, always; -np 1 makes one answer at a time", ()),
    ("--no-webui --no-ui --no-slots", "none", False, "--api-key is what keeps others out; leave it out", ()),
    ("--threads-http", "one", True, "one thread serves all connections", ()),
    ("--ssl-key-file --ssl-cert-file", "one", False, "there is no TLS here; put a reverse proxy in front", ()),
    ("--api-prefix --path --public-path", "one", False, "put a reverse proxy in front that changes paths", ()),
    ("--embedding --embeddings --rerank --reranking", "none", False, "a request says what it wants; leave it out", ()),
    ("--pooling", "one", False, _REQUEST, ()),
    ("--reasoning-format", "one", True, "thoughts are told apart, always", ("auto", "deepseek")),
    ("--chat-template-kwargs --presence-penalty --frequency-penalty -l --logit-bias", "one", False, _REQUEST, ("0",)),
    ("--grammar --grammar-file -j --json-schema -jf --json-schema-file", "one", False, _REQUEST, ()),
    ("--no-prefill-assistant", "none", False, "continue_final_message: false in a request says it", ()),
    ("-sps --slot-prompt-similarity --cache-reuse", "one", True, "what was read is found by its content", ()),
    ("--models-dir --models-preset --models-max", "one", False, _ONE_SERVER, ()),
    ("--sleep-idle-seconds", "one", False, "a server keeps its models until it ends", ("-1",)),
    ("--slot-save-path --media-path", "one", False, "it writes and reads no files for clients; leave it out", ()),
)  # fmt: skip

SERVE = {
    **{name: f for name, f in RUN.items() if name not in ("-np", "--parallel", "--host", "--port")},
    **{name: Foreign(story, value, taken, neutral) for names, value, taken, story, neutral in _SERVER_ROWS
       for name in names.split()},
}  # fmt: skip
"""Options that `ggmq serve` is told about by people who know llama-server."""
