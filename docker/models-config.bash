# Bash functions about a ModelServerConfig, for docker/entrypoint: what a server can start with.
#
# TensorFlow Serving does not start at all while one model of its configuration cannot be loaded or has no version.
# `startable` prints the same configuration without versions that failed: an earlier one on disk is served instead.
# Needs bash 4 and nothing else, for images without Python.
# shellcheck shell=bash disable=SC2034

# "NAME VERSION" -> why that version is not to be loaded at the start.
declare -A left_out=()
# What `read_models` found: for each model its name, its folder, and the text of its fields.
names=() paths=() policies=() labels=() others=()

# read_models TEXT: fills these arrays.
read_models() {
    local text=$1 token previous='' depth=0 field='' index=-1
    local pattern=$'^[ \t\r\n]*(#[^\n]*|"([^"\\\\]|\\\\.)*"|\'([^\'\\\\]|\\\\.)*\'|[A-Za-z0-9_.+-]+|[][{}<>:,;])'
    names=() paths=() policies=() labels=() others=()
    while [[ $text =~ $pattern ]]; do
        token=${BASH_REMATCH[1]} text=${text:${#BASH_REMATCH[0]}}
        [[ $token != '#'* ]] || continue
        case $token in
            '{' | '<') depth=$((depth + 1)) ;;
            '}' | '>') depth=$((depth - 1)) ;;
        esac
        if ((depth == 2)) && [[ $token == ['{<'] ]]; then
            index=${#names[@]}
            names[index]='' paths[index]='' policies[index]='' labels[index]='' others[index]=''
        elif ((depth >= 2)); then
            ((depth > 2)) || [[ $previous == : || ! $token =~ ^[A-Za-z_] ]] || field=$token
            case $field in
                model_version_policy) policies[index]+=" $token" ;;
                version_labels) labels[index]+=" $token" ;;
                *) others[index]+=" $token" ;;
            esac
            if ((depth == 2)) && [[ $token == [\"\']* ]]; then
                [[ $field != name ]] || printf -v 'names[index]' %b "${token:1:-1}"
                [[ $field != base_path ]] || printf -v 'paths[index]' %b "${token:1:-1}"
            fi
        fi
        previous=$token
    done
}

# read_again TEXT: the same for a later text. What failed of a model is forgotten when something else is wanted of it.
read_again() {
    local index version
    local -A before=()
    for index in "${!names[@]}"; do
        before[${names[index]}]=${policies[index]}${labels[index]}
    done
    read_models "$1"
    for index in "${!names[@]}"; do
        [[ ${policies[index]}${labels[index]} != "${before[${names[index]}]-}" ]] || continue
        for version in "${!left_out[@]}"; do
            [[ ${version% *} != "${names[index]}" ]] || unset 'left_out[$version]'
        done
    done
}

# versions_on_disk FOLDER: the numbers of its versions, lowest first, are then in `found`.
versions_on_disk() {
    local folder version
    found=()
    for folder in "$1"/*/; do
        folder=${folder%/} version=${folder##*/}
        [[ -d $folder && $version =~ ^[0-9]{1,18}$ ]] && found+=("$((10#$version))")
    done
    ((${#found[@]} < 2)) || mapfile -t found < <(printf '%s\n' "${found[@]}" | sort -n)
}

# wanted_versions POLICY: those that a policy selects of `found` are then in `wanted`.
wanted_versions() {
    local token number=1
    wanted=()
    case " $1 " in
        *' specific '*)
            for token in $1; do
                [[ ! $token =~ ^[0-9]+$ ]] || wanted+=("$token")
            done
            ;;
        *' all '*) wanted=("${found[@]}") ;;
        *)
            for token in $1; do
                [[ ! $token =~ ^[0-9]+$ ]] || number=$token
            done
            wanted=("${found[@]}")
            ((${#found[@]} <= number)) || wanted=("${found[@]: -number}")
            ;;
    esac
}

# whole FOLDER: whether a version has the variables that its graph restores. TensorFlow Serving loads it without them, and
# then fails every request. The patterns are operations of nodes, with the length before the name, as only nodes have them.
whole() {
    [[ -e $1/variables/variables.index || ! -r $1/saved_model.pb ]] && return
    ! LC_ALL=C grep --quiet --text --fixed-strings $'\x12\x09RestoreV2' "$1/saved_model.pb" ||
        ! LC_ALL=C grep --quiet --text --fixed-strings --regexp=$'\x12\x10AssignVariableOp' \
            --regexp=$'\x12\x06Assign' "$1/saved_model.pb"
}

# choose INDEX: what to start a model with is then in `kept`; whether that is all that is wanted in `complete`; versions
# that are wanted and not whole in `halves`.
choose() {
    local version limit=0
    kept=() complete=true halves=()
    if [[ ${paths[$1]} != /* ]]; then
        # Not a folder here: only what failed tells about it.
        for version in "${!left_out[@]}"; do
            [[ ${version% *} != "${names[$1]}" ]] || complete=false
        done
        return
    fi
    versions_on_disk "${paths[$1]}"
    wanted_versions "${policies[$1]}"
    for version in "${wanted[@]}"; do
        limit=$version
        if [[ -n ${left_out["${names[$1]} $version"]:-} ]]; then
            complete=false
        elif ! whole "${paths[$1]}/$version"; then
            halves+=("$version") complete=false
        elif [[ " ${found[*]} " == *" $version "* ]]; then
            kept+=("$version")
        fi
    done
    ((${#kept[@]} == 0)) || return 0
    complete=false
    # The next lower one, or any.
    for version in "${found[@]}"; do
        [[ -z ${left_out["${names[$1]} $version"]:-} ]] || continue
        whole "${paths[$1]}/$version" || continue
        ((${#kept[@]} && version > limit)) || kept=("$version")
    done
}

# everything_starts: whether nothing has to be left out.
everything_starts() {
    local index
    for index in "${!names[@]}"; do
        choose "$index"
        [[ $complete == true ]] || return 1
    done
}

# specific VERSION...: the policy that selects these.
specific() {
    printf ' model_version_policy { specific {'
    printf ' versions: %s' "$@"
    printf ' } }'
}

# startable: prints the configuration to start with, and fails when it has no model. Where `tried` is set, what could
# not be loaded is in it again, but for labels and for versions that are not whole.
startable() {
    local index version text policy rest found_any=1
    echo 'model_config_list {'
    for index in "${!names[@]}"; do
        choose "$index"
        if [[ $complete == true ]]; then
            echo "  config {${others[index]}${policies[index]}${labels[index]} }"
        elif ((${#kept[@]})); then
            text=${labels[index]}
            # Labels may only point at versions that are served.
            for version in "${wanted[@]}"; do
                [[ " ${kept[*]} " == *" $version "* ]] ||
                    text=${text//value : $version \}/value : ${kept[-1]} \}}
            done
            policy=$(specific "${kept[@]}")
            if [[ -n ${tried:-} && -n ${wanted[*]} ]]; then
                rest=()
                for version in "${wanted[@]}"; do
                    [[ " ${halves[*]} " == *" $version "* ]] || rest+=("$version")
                done
                if ((${#halves[@]} == 0)); then
                    policy=${policies[index]}
                elif ((${#rest[@]})); then
                    policy=$(specific "${rest[@]}")
                fi
            fi
            echo "  config {${others[index]}$policy$text }"
        elif [[ -n ${tried:-} && -n ${found[*]} && -z ${halves[*]} ]]; then
            echo "  config {${others[index]}${policies[index]} }"
        else
            continue
        fi
        found_any=0
    done
    echo '}'
    return $found_any
}
