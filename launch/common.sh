# shellcheck shell=bash
# What the launchers share: options, quoting, dry runs.  They work with the bash 3.2 of macOS, too.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dry_run=no options="" lists="" switches="" # what a launcher takes: see parse

# The words as a POSIX shell would have to read them: one line that survives one more shell.
quote() {
    local word line="" one="'" escaped="'\\''"
    for word in "$@"; do
        case $word in
            "" | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//$one/$escaped}'" ;;
        esac
        line="$line${line:+ }$word"
    done
    printf '%s\n' "$line"
}

# Runs a command; in a dry run prints it instead.
run() {
    if [ "$dry_run" = yes ]; then quote "$@"; else "$@"; fi
}

# What is happening, for people; a comment among the commands of a dry run.
say() {
    if [ "$dry_run" = yes ]; then printf '# %s\n' "$*"; else printf 'launch: %s\n' "$*" >&2; fi
}

# A mistake of the caller: exit code 2, as that of the program.
fail() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

# The comment at the top of a launcher is its help.
usage() {
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
}

# Reads --name=value and --name up to the first word that is no option.
# `options` are names with a value, `lists` those that may be repeated (an array each), `switches` those without a value
# (yes or no).  Sets a variable for each, and `rest` to the words that follow.  No option begins with an
# underscore: such names are local here.
parse() {
    local _option
    while [ $# -gt 0 ]; do
        _option=${1%%=*}
        _option=${_option#--}
        case $1 in
            --help)
                usage
                exit 0
                ;;
            --*=*)
                case " $options " in
                    *" $_option "*) printf -v "$_option" %s "${1#*=}" ;;
                    *)
                        case " $lists " in
                            *" $_option "*) eval "$_option+=(\"\${1#*=}\")" ;;
                            *) fail "no option --$_option=VALUE before CONFIG WORKDIR; --help lists them" ;;
                        esac
                        ;;
                esac
                ;;
            --*)
                case " $switches " in
                    *" $_option "*) printf -v "$_option" yes ;;
                    *) fail "--$_option: unknown, or it needs a value (--$_option=VALUE); --help lists the options" ;;
                esac
                ;;
            *) break ;;
        esac
        shift
    done
    rest=("$@")
}

# Options that have no default: from the command line, or from the environment in capitals (--zone: ZONE).
need() {
    local _option _capitals
    for _option in "$@"; do
        _capitals=$(printf %s "$_option" | tr '[:lower:]' '[:upper:]')
        if [ -z "${!_option:-}" ]; then printf -v "$_option" %s "${!_capitals:-}"; fi
        if [ -z "${!_option}" ]; then fail "--$_option=... is missing (or set $_capitals in the environment)"; fi
    done
}

whole_number() {
    local _option
    for _option in "$@"; do
        case ${!_option} in
            "" | *[!0-9]*) fail "--$_option=${!_option}: expected a whole number" ;;
        esac
    done
}

# The name of a thing in the cloud.
cloud_name() {
    local _option
    for _option in "$@"; do
        case ${!_option} in
            [!a-z]* | *[!a-z0-9-]* | *-) fail "--$_option=${!_option}: expected a-z, 0-9 and hyphens, a letter first" ;;
        esac
    done
}

# Sets `program`: what every launcher ends in, from CONFIG WORKDIR [FLAG ...].
program_from() {
    if [ $# -lt 2 ]; then fail "expected CONFIG WORKDIR [--config.OPTION=VALUE ...] after the options; see --help"; fi
    # shellcheck disable=SC2034
    program=(-m activedpo_jax.main --config "$1" --workdir "$2" "${@:3}")
}

# A disk that goes with its machine, or that other hosts do not see, is no place for a work directory.
need_bucket() {
    case $1 in
        gs://?* | s3://?*) ;;
        *) fail "WORKDIR is $1: expected gs://BUCKET/PATH (or s3://BUCKET/PATH, for one process), since $2" ;;
    esac
}

# A file of variables for the program; what it holds is not shown.
check_env_file() {
    local line right
    if [ ! -f "$1" ]; then fail "--env_file=$1: no such file"; fi
    right='^(#.*|[A-Za-z_][A-Za-z0-9_]*=.*)?$'
    line=$(grep -nvE "$right" "$1" | cut -d: -f1 | head -n 1) || :
    if [ -n "$line" ]; then fail "--env_file=$1, line $line: expected NAME=VALUE, or # and a comment"; fi
}

# .venv with the package and an extra (tpu, gpu or none), unless it is there.
environment() {
    local extra=""
    if [ -d "$root/.venv" ]; then return; fi
    if [ "$1" != none ]; then extra="[$1]"; fi
    run python3 -m venv "$root/.venv"
    run "$root/.venv/bin/pip" install -e "$root$extra"
}

build_image() {
    run docker build -f "$root/launch/Dockerfile" --build-arg "EXTRA=$1" -t "$2" "$root"
}
