{{/* What the schema cannot say: fields that must agree with one another. Each message says what was got, wanted, and what to do. */}}
{{- define "finery.checks" -}}
{{- $known := list -}}
{{- range .Values.baseModels.models }}{{ $known = append $known .name }}{{ end -}}
{{- if ne (len $known) (len (uniq $known)) -}}
{{- fail (printf "baseModels.models: got a name twice (%s); give each model a name of its own" (join ", " $known)) -}}
{{- end -}}
{{- $pools := list -}}
{{- range .Values.serving.pools -}}
{{- $pool := . -}}
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
{{- $loras := int (.maxLoras | default 4) -}}
{{- $held := int (.maxCpuLoras | default 8) -}}
{{- if gt $loras $held -}}
{{- fail (printf "serving.pools[%s].maxLoras: got %d, wanted %d at the most, which is maxCpuLoras; raise that as well" .name $loras $held) -}}
{{- end -}}
{{- range $model := $.Values.baseModels.models -}}
{{- if and (eq $model.name $base) (gt (int ($pool.maxModelLen | default 0)) (int $model.maxSequenceLength)) -}}
{{- fail (printf "serving.pools[%s].maxModelLen: got %d, wanted %d at the most, which is the maxSequenceLength of %s" $pool.name (int $pool.maxModelLen) (int $model.maxSequenceLength) $base) -}}
{{- end -}}
{{- end -}}
{{- with .autoscaling -}}
{{- if and .enabled (gt (int (.minReplicas | default 0)) (int .maxReplicas)) -}}
{{- fail (printf "serving.pools[%s].autoscaling: got minReplicas %d above maxReplicas %d" $pool.name (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{- end -}}
{{- $pools = append $pools .name -}}
{{- if and .autoscaling .autoscaling.enabled (not $.Values.monitoring.prometheusUrl) -}}
{{- fail (printf "serving.pools[%s].autoscaling: KEDA asks Prometheus; set monitoring.prometheusUrl to its address" .name) -}}
{{- end -}}
{{- end -}}
{{- /* A group of several nodes makes a StatefulSet of its own for its followers, named by a number behind the pool's. */ -}}
{{- range .Values.serving.pools -}}
{{- if gt (int (.nodes | default 1)) 1 -}}
{{- $group := .name -}}
{{- range $other := $pools -}}
{{- if regexMatch (printf "^%s-[0-9]+$" $group) $other -}}
{{- fail (printf "serving.pools[%s].name: a pool of several nodes, %s, makes StatefulSets of that name; call it something else" $other $group) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if ne (len $pools) (len (uniq $pools)) -}}
{{- fail (printf "serving.pools: got a name twice (%s); give each pool a name of its own" (join ", " $pools)) -}}
{{- end -}}
{{- if contains "://" .Values.image.registry -}}
{{- fail (printf "image.registry: got %q, wanted a registry without a scheme, such as registry.example.org/finery" .Values.image.registry) -}}
{{- end -}}
{{- range $host := concat .Values.gateway.ingress.hosts .Values.gateway.httpRoute.hostnames -}}
{{- if contains "/" $host -}}
{{- fail (printf "gateway: got the host %q, wanted a name without scheme and path, such as finery.example.org" $host) -}}
{{- end -}}
{{- end -}}
{{- $worker := .Values.trainer.worker -}}
{{- $most := int $worker.maxGpusPerJob -}}
{{- $resource := $worker.gpu.resourceName | default "" -}}
{{- if and (or (contains "/mig-" $resource) (hasSuffix ".shared" $resource)) (gt $most 1) -}}
{{- fail (printf "trainer.worker.maxGpusPerJob: got %d over %s, wanted 1; slices and shares of GPUs cannot work together on one job" $most $resource) -}}
{{- end -}}
{{- if gt (int ($worker.gpu.count | default 0)) $most -}}
{{- fail (printf "trainer.worker.gpu.count: got %d, wanted %d at the most, which is maxGpusPerJob; a job's own spec.gpus takes its place" (int $worker.gpu.count) $most) -}}
{{- end -}}
{{- if and (ne .Values.objectStore.kind "external") (or .Values.objectStore.external.endpoint .Values.objectStore.external.existingSecret) -}}
{{- fail (printf "objectStore.external: got values with kind %q, which would go unused while data went to the bundled store; set objectStore.kind: external, or leave them out" .Values.objectStore.kind) -}}
{{- end -}}
{{- if and (ne .Values.postgres.kind "external") .Values.postgres.external.existingSecret -}}
{{- fail (printf "postgres.external: got values with kind %q, which would go unused while data went to the bundled database; set postgres.kind: external, or leave them out" .Values.postgres.kind) -}}
{{- end -}}
{{- if and (eq .Values.objectStore.kind "external") (contains "://" .Values.objectStore.external.endpoint) -}}
{{- fail (printf "objectStore.external.endpoint: got %q, wanted host:port without a scheme; objectStore.external.secure says whether it is HTTPS" .Values.objectStore.external.endpoint) -}}
{{- end -}}
{{- end -}}
