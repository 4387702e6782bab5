#!/usr/bin/env bash
# Measure the figures of docs/results that a GPU can give in one sitting, each part with a time limit of its own:
#   benchmarks/evidence.sh OUT PART...
# OUT is a folder for the JSON files (benchmarks/results/h100-sxm). A part is a line of the case below.
# AXOLOTL names a checkout of axolotl, or its unpacked wheel; COMMIT the commit where there is no git.
set -uo pipefail
out=$1
shift
mkdir -p "$out"
peers=(${AXOLOTL:+--axolotl-path "$AXOLOTL"})
commit=(${COMMIT:+--commit "$COMMIT"})
python=${PYTHON:-python3}
failed=0

bench() {  # SECONDS FILE ARGUMENTS...: the rows go to OUT/FILE.json, the tables to OUT/FILE.txt
    local limit=$1 file=$2
    shift 2
    local within=()  # a model stops in time to write what it has; 50 of 60 seconds, the rest to load and to write
    case " $* " in
    *" first-step "* | *" --parallel "*) ;;
    " model "*) within=(--minutes "$((limit / 72)).$((limit % 72 * 10 / 72))") ;;
    esac
    echo "== $file: bench $*"
    timeout --signal=INT --kill-after=20 "$limit" "$python" -m doratune.cli bench "$@" "${within[@]}" "${commit[@]}" --targets \
        --output "$out/$file.json" > "$out/$file.txt" 2>&1 || { echo "$file: exit code $?"; failed=1; }
    tail -n 40 "$out/$file.txt"
}

# The first step with nothing but stored binaries: nothing is compiled, and there is no C compiler.
without_compiler() {  # FILE MODEL TOKENS ARGUMENTS...
    local file=$1 store=$out/$1.sqlite
    timeout 120 "$python" -m doratune.cli cache build --model "$2" --rank 16 --tokens "$3" --replace -o "$store" \
        || { echo "$file: no store"; failed=1; return; }
    DORATUNE_NO_JIT=1 CC=/no/compiler bench 200 "$file" "${@:4}" --impl peft_lora --impl doratune --store "$store"
}

large=(model --checkpointing --impl peft_lora --impl doratune --op step --op inference --rounds 6)
small=(model --rank 16 --seq 2048 --no-checkpointing --modes bf16 --rounds 20 --impl peft_lora --impl peft_dora --impl doratune)
first=(model --rank 16 --op first-step --modes bf16)
fused=(${AXOLOTL:+--impl axolotl_lora})

for part; do
    case $part in
    large) bench 300 model-8b "${large[@]}" "${fused[@]}" "${peers[@]}" --modes bf16 --rank 16 ;;
    large-384) bench 300 model-8b-r384 "${large[@]}" "${fused[@]}" "${peers[@]}" --modes bf16 --rank 384 ;;
    large-autocast) bench 300 model-8b-autocast "${large[@]}" "${fused[@]}" "${peers[@]}" --modes autocast --rank 16 --rank 384 ;;
    1b) bench 200 model-1b "${small[@]}" "${fused[@]}" "${peers[@]}" --shape 1b --op step --op inference --op decode ;;
    0.5b) bench 200 model-0.5b "${small[@]}" "${fused[@]}" "${peers[@]}" --shape 0.5b --op step --op inference --op decode ;;
    first) bench 250 first-step "${first[@]}" --shape 0.5b --seq 2048 ;;
    no-jit) without_compiler no-jit qwen2.5-0.5b 2048 "${first[@]}" --shape 0.5b --seq 2048 ;;
    no-jit-8b) without_compiler no-jit-8b llama-8b 4096 "${first[@]}" --shape 8b --seq 4096 ;;
    compiled)
        bench 300 model-compiled model --layers 4 --no-checkpointing --compile --rank 16 --rank 384 --modes bf16 --rounds 10 \
            --impl peft_lora --impl peft_lora_compiled --impl doratune --impl doratune_compiled --op step
        ;;
    norms) bench 200 norms norms --model llama-8b --rank 16 --rank 384 ;;
    packed) bench 200 packed packed ;;
    nf4 | int8 | fp8 | hqq)
        bench 200 "model-$part" model --layers 4 --rank 16 --rank 64 --seq 2048 --checkpointing --modes bf16 --quant "$part" \
            --impl peft_lora --impl doratune "${fused[@]}" "${peers[@]}" --op step --op inference --op decode
        ;;
    ddp | fsdp2) bench 200 "$part" model --layers 6 --rank 16 --modes bf16 --parallel "$part" --processes 2 --rounds 10 ;;
    dequantise) bench 120 dequantise dequantise ;;
    host) bench 120 host host ;;
    *) echo "unknown part $part" >&2; exit 2 ;;
    esac
done
exit "$failed"
