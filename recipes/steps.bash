# What all recipes share; they source it. Paths are relative to the folder in which a recipe is started.
#   RAW     downloads, unpacked, one folder per dataset (downloads/gta5)     DATA    prepared datasets (data/gta5)
#   START   start model     RUN    run folder     LAUNCH  options of `accelerate launch`
RAW=${RAW:-downloads} DATA=${DATA:-data}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# A checkout runs without install. In a wheel, $root is the package itself.
[ ! -d "$root/tqdm_seg" ] || export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
lists=$root/tqdm_seg/data/lists
[ -d "$lists" ] || lists=$root/data/lists  # the published lists of scenes and splits
dry="" missing=""
for word in "$@"; do [ "$word" != --dry-run ] || dry=yes; done

tqdm-seg() { python -m tqdm_seg.cli "$@"; }

# unless PATH COMMAND...: runs the command if PATH does not exist; a dry run shows it instead.
unless() {
    [ ! -e "$1" ] || return 0
    if [ -z "$dry" ]; then "${@:2}"; else missing=yes && echo "to do first: ${*:2}"; fi
}

# stand_in PRESET: what a dry run plans with while data or start model are missing: random weights, the example frames.
stand_in() {
    [ -n "$missing" ] || return 0
    frames=$(python -c 'from tqdm_seg.data.files import example; print(example("orfd_mini"))')
    echo "--model $1 --data $frames --eval-data $frames"
}

# True after a training that ended with a model; a dry run never goes on to test.
trained() { [ -z "$dry" ] && [ -d "$RUN/model" ]; }
