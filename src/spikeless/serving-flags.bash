# Bash functions about flags of tensorflow_model_server, for docker/entrypoint and spikeless.launch.
#
# They need the flags in the array `flags`, and a function `fail MESSAGE` that exits.
# shellcheck shell=bash disable=SC2154

# given NAME: whether the flag is among the arguments; its value is then in $value.
given() {
    local flag found=1
    value=
    for flag in "${flags[@]}"; do
        case $flag in
            "--$1="*) value=${flag#*=} found=0 ;;
            "--$1") value=true found=0 ;;
        esac
    done
    return $found
}

# A flag's value as the text format of protocol buffers writes a string.
quoted() {
    local text=${1//\\/\\\\}
    printf '"%s"' "${text//\"/\\\"}"
}

# given_file NAME: whether the flag is among the arguments; the text of the file that it names is then in $text.
given_file() {
    given "$1" || return
    [[ -r $value ]] || fail "cannot read --$1=$value"
    text=$(< "$value")$'\n'
}

# Prints a platform configuration. It silently overrides the flags about sessions, batching, warmup, tags and
# TensorFlow Lite, so it repeats their values. It says what has no flag: a version is restored on the thread that
# loads it instead of the threads that requests run on, and warmup can have several threads.
platform_config() {
    local name tag session=
    given_file tensorflow_session_config_file && session=$text
    echo 'platform_configs { key: "tensorflow" value { source_adapter_config {'
    echo '[type.googleapis.com/tensorflow.serving.SavedModelBundleSourceAdapterConfig] { legacy_config {'
    if given tensorflow_session_parallelism && [[ $value != 0 ]]; then
        session+="intra_op_parallelism_threads: $value inter_op_parallelism_threads: $value"
    else
        given tensorflow_intra_op_parallelism && session+=" intra_op_parallelism_threads: $value"
        given tensorflow_inter_op_parallelism && session+=" inter_op_parallelism_threads: $value"
    fi
    given per_process_gpu_memory_fraction && session+=" gpu_options { per_process_gpu_memory_fraction: $value }"
    [[ -z ${DISABLE_META_OPTIMIZER:-} ]] ||
        session+=" graph_options { rewrite_options { disable_meta_optimizer: $DISABLE_META_OPTIMIZER } }"
    echo "session_config { $session }"
    echo 'session_run_load_threadpool_index { value: -1 }'
    given saved_model_tags || value=serve
    for tag in ${value//,/ }; do
        echo "saved_model_tags: $(quoted "$tag")"
    done
    given enable_model_warmup || value=true
    echo "enable_model_warmup: $value"
    given num_request_iterations_for_warmup || value=1
    echo "model_warmup_options { num_request_iterations { value: $value }"
    echo "num_model_warmup_threads { value: ${WARMUP_THREADS:-1} } }"
    given remove_unused_fields_from_bundle_metagraph || value=true
    echo "remove_unused_fields_from_bundle_metagraph: $value"
    given mixed_precision && echo "mixed_precision: $(quoted "$value")"
    for name in prefer_tflite_model num_tflite_pools num_tflite_interpreters_per_pool; do
        given $name && echo "$name: $value"
    done
    if given enable_batching && [[ $value == true ]]; then
        if given_file batching_parameters_file; then
            echo "batching_parameters { $text }"
        else
            echo 'batching_parameters { thread_pool_name { value: "model_server_batch_threads" } }'
        fi
        given enable_per_model_batching_parameters && echo "enable_per_model_batching_params: $value"
    fi
    echo '} } } } }'
}
