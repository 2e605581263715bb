{{/* What all pods have in common: security, volumes, scheduling, probes. */}}

{{- define "finery.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "finery.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* {root, component, values, config?}: a pod template's metadata. `config` is what pods must be started anew for; the
chart's version is not, so it is in no label here. */}}
{{- define "finery.podMetadata" -}}
labels:
  {{- include "finery.selectorLabels" . | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- with .values.podLabels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- $notes := dict }}
{{- with .config }}{{ $_ := set $notes "checksum/config" (. | sha256sum) }}{{ end }}
{{- if and (include "finery.usesAnnotations" .root) (ne .component "serving-follower") }}
{{- $_ := set $notes "prometheus.io/scrape" "true" }}
{{- $_ := set $notes "prometheus.io/port" "9100" }}
{{- $_ := set $notes "prometheus.io/path" "/metrics" }}
{{- end }}
{{- $notes = merge (deepCopy (.values.podAnnotations | default dict)) $notes }}
{{- with $notes }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* {root, values}: a volume source for scratch files: the node's disk, or a volume of a storage class that goes with the pod. */}}
{{- define "finery.scratch" -}}
{{- if .storageClassName -}}
ephemeral:
  volumeClaimTemplate:
    spec:
      accessModes: [ReadWriteOnce]
      storageClassName: {{ .storageClassName }}
      resources:
        requests:
          storage: {{ .size }}
{{- else -}}
emptyDir:
  sizeLimit: {{ .size }}
{{- end -}}
{{- end -}}

{{- define "finery.modelsVolume" -}}
- name: models
{{- if eq .Values.baseModels.cache.kind "hostPath" }}
  hostPath:
    path: {{ .Values.baseModels.cache.hostPath }}
    type: Directory
{{- else }}
  persistentVolumeClaim:
    claimName: {{ include "finery.modelsClaimName" . }}
{{- end }}
{{- end -}}

{{/* {gpu, values}: nodeSelector, tolerations, affinity and the runtime, of the component and its GPU block together. */}}
{{- define "finery.scheduling" -}}
{{- $gpu := .gpu | default dict -}}
{{- with merge (deepCopy ($gpu.nodeSelector | default dict)) (.values.nodeSelector | default dict) }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with concat ($gpu.tolerations | default list) (.values.tolerations | default list) }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $gpu.affinity | default .values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $gpu.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $gpu.resourceClaims }}
resourceClaims:
  {{- range . }}
  - {{ omit . "request" | toYaml | nindent 4 | trim }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* {root, component, labels?}: replicas go to different machines and zones where they can. */}}
{{- define "finery.spread" -}}
{{- $when := .root.Values.topologySpread.whenUnsatisfiable -}}
{{- $context := . -}}
topologySpreadConstraints:
{{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: {{ $when }}
    labelSelector:
      matchLabels:
        {{- include "finery.selectorLabels" $context | nindent 8 }}
        {{- with $context.labels }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
{{- end }}
{{- end -}}

{{/* {resources, gpu, count}: a container's resources with its GPUs, or its DRA claims. */}}
{{- define "finery.resources" -}}
{{- $resources := deepCopy (.resources | default dict) -}}
{{- $gpu := .gpu | default dict -}}
{{- if $gpu.resourceClaims -}}
{{- $claims := list -}}
{{- range $gpu.resourceClaims }}
{{- $claims = append $claims (pick . "name" "request") }}
{{- end -}}
{{- $_ := set $resources "claims" $claims -}}
{{- else if gt (int .count) 0 -}}
{{- $limits := $resources.limits | default dict -}}
{{- $_ := set $limits ($gpu.resourceName | default "nvidia.com/gpu") (int .count) -}}
{{- $_ := set $resources "limits" $limits -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* {startupSeconds}: the inner services' probes, by gRPC's own health protocol. */}}
{{- define "finery.grpcProbes" -}}
startupProbe:
  grpc: {port: 9000}
  periodSeconds: 5
  failureThreshold: {{ div (add (int .startupSeconds) 4) 5 }}
livenessProbe:
  grpc: {port: 9000}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  grpc: {port: 9000{{ with .readyService }}, service: {{ . }}{{ end }}}
  periodSeconds: 5
  timeoutSeconds: 3
lifecycle:
  # Until kube-proxy and clients have heard that this pod goes, it still answers.
  preStop:
    sleep:
      seconds: 5
{{- end -}}

{{- define "finery.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}
