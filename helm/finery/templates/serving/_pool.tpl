{{/* The pods of a serving pool. vLLM is a child of the agent, in one container: the agent starts, watches and ends it. */}}

{{/* {root, pool} */}}
{{- define "finery.poolLabels" -}}
finery.dev/pool: {{ .pool.name }}
{{- end -}}

{{/* {root, pool}: all pods of a pool, agents and followers. */}}
{{- define "finery.poolSelectorLabels" -}}
app.kubernetes.io/name: finery
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{ include "finery.poolLabels" . }}
{{- end -}}

{{/* {root, pool}: what agent and followers read alike; both make vLLM's command of it. */}}
{{- define "finery.env.pool" -}}
{{- $pool := .pool -}}
- name: FINERY_SERVING_BASE_MODEL
  value: {{ include "finery.poolBase" . }}
- name: FINERY_SERVING_DEVICE
  value: {{ $pool.device | default "cuda" }}
- name: FINERY_TENSOR_PARALLEL_SIZE
  value: {{ $pool.tensorParallelSize | default 1 | quote }}
{{- with $pool.gpuMemoryUtilization }}
- name: FINERY_GPU_MEMORY_UTILIZATION
  value: {{ . | quote }}
{{- end }}
- name: FINERY_DRAIN_S
  value: {{ .root.Values.serving.drainSeconds | quote }}
- name: FINERY_MAX_LORAS
  value: {{ $pool.maxLoras | default 4 | quote }}
- name: FINERY_MAX_CPU_LORAS
  value: {{ $pool.maxCpuLoras | default 8 | quote }}
- name: FINERY_MAX_LORA_RANK
  value: {{ $pool.maxLoraRank | default 0 | quote }}
- name: FINERY_MAX_MODEL_LEN
  value: {{ $pool.maxModelLen | default 0 | quote }}
- name: FINERY_TOOL_CALL_PARSER
  value: {{ $pool.toolCallParser | default "auto" }}
{{- if eq ($pool.device | default "cuda") "cpu" }}
- name: FINERY_VLLM_KV_CACHE_GIB
  value: {{ $pool.kvCacheGib | default 2 | quote }}
{{- end }}
- name: FINERY_VLLM_START_TIMEOUT_S
  value: {{ $pool.startupSeconds | default 900 | quote }}
- name: FINERY_RUNTIME_DIR
  value: /tmp
{{- if gt (int ($pool.nodes | default 1)) 1 }}
- name: FINERY_VLLM_NODES
  value: {{ $pool.nodes | quote }}
- name: FINERY_VLLM_MASTER_ADDRESS
  value: $(LWS_LEADER_ADDRESS)
{{- end }}
{{- end -}}

{{/* {root, pool, follows}: a pod template; `follows` for the pods of a group that answer no requests of their own. */}}
{{- define "finery.poolPod" -}}
{{- $root := .root -}}
{{- $pool := .pool -}}
{{- $gpu := $pool.gpu | default dict -}}
{{- $isCpu := eq ($pool.device | default "cuda") "cpu" -}}
{{- $count := ternary 0 (int ($pool.tensorParallelSize | default 1)) $isCpu -}}
{{- $nodes := int ($pool.nodes | default 1) -}}
{{- $startup := int ($pool.startupSeconds | default 900) -}}
{{- $labels := fromYaml (include "finery.poolLabels" .) -}}
{{- $component := ternary "serving-follower" "serving" (default false .follows) -}}
metadata:
  {{- include "finery.podMetadata" (dict "root" $root "component" $component "values" $pool "labels" $labels "config" (include "finery.catalogue" $root)) | nindent 2 }}
spec:
  serviceAccountName: {{ include "finery.fullname" $root }}
  automountServiceAccountToken: false
  # Process 1 is the sandbox then, which reaps what a killed process leaves behind.
  shareProcessNamespace: true
  enableServiceLinks: false
  # 5 s until nobody asks this agent, the answers in flight, 8 s of gRPC calls, 10 s for vLLM's end, and some to spare.
  terminationGracePeriodSeconds: {{ add (int $root.Values.serving.drainSeconds) 40 }}
  securityContext:
    {{- include "finery.podSecurity" $root | nindent 4 }}
  {{- include "finery.pullSecrets" $root | nindent 2 }}
  {{- include "finery.scheduling" (dict "values" $pool "gpu" $gpu) | nindent 2 }}
  {{- if eq $nodes 1 }}
  {{- include "finery.spread" (dict "root" $root "component" "serving" "labels" $labels) | nindent 2 }}
  {{- end }}
  initContainers:
    - name: base-weights
      image: {{ include "finery.image" (dict "root" $root "image" $root.Values.dataprep.image) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      command: [python, -m, finery_common.base_weights, wait, /models/{{ include "finery.poolBase" . }}]
      securityContext:
        {{- include "finery.containerSecurity" $root | nindent 8 }}
      resources:
        requests: {cpu: 10m, memory: 64Mi}
        limits: {memory: 256Mi}
      volumeMounts:
        - {name: models, mountPath: /models, readOnly: true}
  containers:
    - name: serving
      image: {{ include "finery.image" (dict "root" $root "image" (merge (deepCopy ($pool.image | default dict)) $root.Values.serving.image)) }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      {{- if .follows }}
      command: [python, -m, finery_serving.follower]
      {{- end }}
      securityContext:
        {{- include "finery.containerSecurity" $root | nindent 8 }}
      env:
        - name: POD_IP
          valueFrom: {fieldRef: {fieldPath: status.podIP}}
        {{- if gt $nodes 1 }}
        - name: VLLM_HOST_IP
          value: $(POD_IP)
        {{- end }}
        {{- if .follows }}
        {{- include "finery.env.base" $root | nindent 8 }}
        {{- include "finery.env.catalogue" $root | nindent 8 }}
        {{- include "finery.env.pool" . | nindent 8 }}
        - name: FINERY_VLLM_NODE_RANK
          value: $(LWS_WORKER_INDEX)
        {{- else }}
        {{- include "finery.env.service" $root | nindent 8 }}
        {{- include "finery.env.catalogue" $root | nindent 8 }}
        {{- include "finery.env.pool" . | nindent 8 }}
        # Of the pod's own name, which a StatefulSet gives again after every restart.
        - name: FINERY_SERVING_REPLICA
          valueFrom: {fieldRef: {fieldPath: metadata.name}}
        - name: FINERY_GRPC_ADDRESS
          value: 0.0.0.0:9000
        - name: FINERY_VLLM_LISTEN_ADDRESS
          value: 0.0.0.0:8443
        - name: FINERY_VLLM_ADVERTISE_ADDRESS
          value: $(POD_IP):8443
        - name: FINERY_VLLM_TLS_CERT_FILE
          value: /etc/finery/vllm-tls.crt
        - name: FINERY_VLLM_TLS_KEY_FILE
          value: /etc/finery/vllm-tls.key
        - name: FINERY_VLLM_CA_FILE
          value: /etc/finery/vllm-ca.crt
        {{- end }}
        {{- if $pool.adapterCacheClaim }}
        - name: FINERY_CACHE_DIR
          value: /cache
        {{- end }}
        {{- with $pool.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if not .follows }}
      ports:
        - {name: grpc, containerPort: 9000}
        - {name: vllm, containerPort: 8443}
        - {name: metrics, containerPort: 9100}
      # The agent answers once the base model's files are hashed; its vLLM is loaded later still, which readiness waits for.
      {{- include "finery.grpcProbes" (dict "startupSeconds" $startup "readyService" "vllm") | nindent 6 }}
      {{- end }}
      resources:
        {{- include "finery.resources" (dict "resources" ($pool.resources | default $root.Values.serving.resources) "gpu" $gpu "count" $count) | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/finery, readOnly: true}
        - {name: models, mountPath: /models, readOnly: true}
        - {name: state, mountPath: /var/lib/finery}
        - {name: tmp, mountPath: /tmp}
        - {name: shm, mountPath: /dev/shm}
        {{- if $pool.adapterCacheClaim }}
        - {name: adapters, mountPath: /cache}
        {{- end }}
  volumes:
    - name: config
      projected:
        defaultMode: 0440
        sources:
          {{- include "finery.configSources" (ternary (dict "root" $root "catalogue" true) (dict "root" $root "token" true "store" true "catalogue" true "vllmKey" true "vllmCa" true) (default false .follows)) | nindent 10 }}
    {{- include "finery.modelsVolume" $root | nindent 4 }}
    - name: state
      {{- include "finery.scratch" ($pool.scratch | default $root.Values.serving.scratch) | nindent 6 }}
    - name: tmp
      emptyDir: {}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $pool.shmSize | default "8Gi" }}}
    {{- with $pool.adapterCacheClaim }}
    - name: adapters
      persistentVolumeClaim: {claimName: {{ . }}}
    {{- end }}
{{- end -}}
