{{/* Names, labels and images. Every template takes the root context as "root" where it takes a dict. */}}

{{- define "finery.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains "finery" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-finery" .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* {root, component}: labels that never change, for selectors. */}}
{{- define "finery.selectorLabels" -}}
app.kubernetes.io/name: finery
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* {root, component} */}}
{{- define "finery.labels" -}}
helm.sh/chart: {{ printf "finery-%s" .root.Chart.Version | replace "+" "_" }}
{{ include "finery.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: finery
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end -}}

{{/* {root, image}: an image of Finery's own; a digest wins over a tag. */}}
{{- define "finery.image" -}}
{{- $shared := .root.Values.image -}}
{{- $name := .image.repository -}}
{{- with $shared.registry }}{{ $name = printf "%s/%s" (trimSuffix "/" .) $name }}{{ end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (.image.tag | default $shared.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* An image that others make: {registry, repository, tag, digest}. */}}
{{- define "finery.otherImage" -}}
{{- $name := printf "%s/%s" (trimSuffix "/" .registry) .repository -}}
{{- if .digest }}{{ printf "%s@%s" $name .digest }}{{ else }}{{ printf "%s:%s" $name .tag }}{{ end -}}
{{- end -}}

{{- define "finery.tokenSecretName" -}}
{{- .Values.tokenSecret.existingSecret | default (printf "%s-token" (include "finery.fullname" .)) -}}
{{- end -}}

{{- define "finery.storeSecretName" -}}
{{- if eq .Values.objectStore.kind "external" -}}
{{- .Values.objectStore.external.existingSecret -}}
{{- else -}}
{{- .Values.objectStore.minio.existingSecret | default (printf "%s-minio" (include "finery.fullname" .)) -}}
{{- end -}}
{{- end -}}

{{- define "finery.storeEndpoint" -}}
{{- if eq .Values.objectStore.kind "external" -}}
{{- .Values.objectStore.external.endpoint -}}
{{- else -}}
{{- printf "%s-minio:9000" (include "finery.fullname" .) -}}
{{- end -}}
{{- end -}}

{{- define "finery.databaseSecretName" -}}
{{- if eq .Values.postgres.kind "external" -}}
{{- .Values.postgres.external.existingSecret -}}
{{- else -}}
{{- .Values.postgres.bundled.existingSecret | default (printf "%s-postgres" (include "finery.fullname" .)) -}}
{{- end -}}
{{- end -}}

{{- define "finery.vllmTlsSecretName" -}}
{{- .Values.serving.tls.existingSecret | default (printf "%s-vllm-tls" (include "finery.fullname" .)) -}}
{{- end -}}

{{- define "finery.modelsClaimName" -}}
{{- .Values.baseModels.cache.existingClaim | default (printf "%s-models" (include "finery.fullname" .)) -}}
{{- end -}}

{{/* {root, pool}: the StatefulSet or LeaderWorkerSet of a serving pool, and what starts its pods' names. */}}
{{- define "finery.poolName" -}}
{{- printf "%s-serving-%s" (include "finery.fullname" .root) .pool.name -}}
{{- end -}}

{{/* {root, pool}: the base model that a pool serves: its own, or the first there is. */}}
{{- define "finery.poolBase" -}}
{{- .pool.baseModel | default (first .root.Values.baseModels.models).name -}}
{{- end -}}

{{/* "true" where the operator's kinds are to be made. */}}
{{- define "finery.usesOperator" -}}
{{- $mode := .Values.monitoring.mode -}}
{{- if or (eq $mode "operator") (and (eq $mode "auto") (.Capabilities.APIVersions.Has "monitoring.coreos.com/v1")) -}}true{{- end -}}
{{- end -}}

{{/* "true" where Prometheus finds pods by their annotations. */}}
{{- define "finery.usesAnnotations" -}}
{{- $mode := .Values.monitoring.mode -}}
{{- if or (eq $mode "annotations") (and (eq $mode "auto") (not (include "finery.usesOperator" .))) -}}true{{- end -}}
{{- end -}}
