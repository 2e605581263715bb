{{/* What the schema cannot say: fields that must agree with one another. Each message says what was got, wanted, and what to do. */}}
{{- define "finery.checks" -}}
{{- $known := list -}}
{{- range .Values.baseModels.models }}{{ $known = append $known .name }}{{ end -}}
{{- if ne (len $known) (len (uniq $known)) -}}
{{- fail (printf "baseModels.models: got a name twice (%s); give each model a name of its own" (join ", " $known)) -}}
{{- end -}}
{{- $pools := list -}}
{{- $bases := list -}}
{{- range .Values.serving.pools -}}
{{- $base := include "finery.poolBase" (dict "root" $ "pool" .) -}}
{{- if not (has $base $known) -}}
{{- fail (printf "serving.pools[%s].baseModel: got %q, wanted one of baseModels.models (%s); add it there or correct the name" .name $base (join ", " $known)) -}}
{{- end -}}
{{- /* A label of a StatefulSet's pods is its name and a hash of 10 characters, 63 in all; a group's own StatefulSets have a number between. */ -}}
{{- $name := include "finery.poolName" (dict "root" $ "pool" .) -}}
{{- $limit := ternary 48 52 (gt (int (.nodes | default 1)) 1) -}}
{{- if gt (len $name) $limit -}}
{{- fail (printf "serving.pools[%s].name: got %s, %d characters, wanted %d at the most; shorten the pool's name, or the release's by fullnameOverride" .name $name (len $name) $limit) -}}
{{- end -}}
{{- $pools = append $pools .name -}}
{{- $bases = append $bases $base -}}
{{- if and .autoscaling .autoscaling.enabled (not $.Values.monitoring.prometheusUrl) -}}
{{- fail (printf "serving.pools[%s].autoscaling: KEDA asks Prometheus; set monitoring.prometheusUrl to its address" .name) -}}
{{- end -}}
{{- end -}}
{{- if ne (len $pools) (len (uniq $pools)) -}}
{{- fail (printf "serving.pools: got a name twice (%s); give each pool a name of its own" (join ", " $pools)) -}}
{{- end -}}
{{- if gt (len (uniq $bases)) 1 -}}
{{- fail (printf "serving.pools: got pools of several base models (%s), but the agents of one installation serve one; let all pools have the same baseModel, on as many kinds of GPU as you like, and install another release for each further base model" (join ", " (uniq $bases))) -}}
{{- end -}}
{{- if and (eq .Values.objectStore.kind "external") (contains "://" .Values.objectStore.external.endpoint) -}}
{{- fail (printf "objectStore.external.endpoint: got %q, wanted host:port without a scheme; objectStore.external.secure says whether it is HTTPS" .Values.objectStore.external.endpoint) -}}
{{- end -}}
{{- end -}}
