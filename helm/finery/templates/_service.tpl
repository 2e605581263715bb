{{/*
One inner service of one kind of pod: its Deployment, Service, PodDisruptionBudget and what scales it.
{root, component, values, env?, sources?, config?, single?, serviceAccount?}
*/}}
{{- define "finery.innerService" -}}
{{- $name := printf "%s-%s" (include "finery.fullname" .root) .component -}}
{{- $scaled := and .values.autoscaling .values.autoscaling.enabled -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ $name }}
  labels:
    {{- include "finery.labels" . | nindent 4 }}
spec:
  {{- if not $scaled }}
  replicas: {{ dig "replicas" 1 .values }}
  {{- end }}
  {{- if .single }}
  # Two at a time would both hand out jobs.
  strategy:
    type: Recreate
  {{- else }}
  strategy:
    type: RollingUpdate
    rollingUpdate: {maxUnavailable: 0, maxSurge: 1}
  {{- end }}
  selector:
    matchLabels:
      {{- include "finery.selectorLabels" . | nindent 6 }}
  template:
    metadata:
      {{- include "finery.podMetadata" . | nindent 6 }}
    spec:
      serviceAccountName: {{ .serviceAccount | default (include "finery.fullname" .root) }}
      automountServiceAccountToken: {{ eq .component "trainer" }}
      # Process 1 is the sandbox then, which reaps what a killed process leaves behind.
      shareProcessNamespace: true
      enableServiceLinks: false
      terminationGracePeriodSeconds: 45
      securityContext:
        {{- include "finery.podSecurity" .root | nindent 8 }}
      {{- include "finery.pullSecrets" .root | nindent 6 }}
      {{- include "finery.scheduling" (dict "values" .values "gpu" .values.gpu) | nindent 6 }}
      {{- include "finery.spread" . | nindent 6 }}
      containers:
        - name: {{ .component }}
          image: {{ include "finery.image" (dict "root" .root "image" .values.image) }}
          imagePullPolicy: {{ .root.Values.image.pullPolicy }}
          securityContext:
            {{- include "finery.containerSecurity" .root | nindent 12 }}
          env:
            {{- include "finery.env.service" .root | nindent 12 }}
            {{- include "finery.env.catalogue" .root | nindent 12 }}
            - name: FINERY_GRPC_ADDRESS
              value: 0.0.0.0:9000
            {{- with .env }}
            {{- . | nindent 12 }}
            {{- end }}
            {{- with .values.extraEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: grpc, containerPort: 9000}
            - {name: metrics, containerPort: 9100}
          {{- include "finery.grpcProbes" (dict "startupSeconds" 180) | nindent 10 }}
          resources:
            {{- include "finery.resources" (dict "resources" .values.resources "gpu" .values.gpu "count" (dig "gpu" "count" 0 .values)) | nindent 12 }}
          volumeMounts:
            - {name: config, mountPath: /etc/finery, readOnly: true}
            - {name: models, mountPath: /models, readOnly: true}
            - {name: state, mountPath: /var/lib/finery}
            - {name: tmp, mountPath: /tmp}
      volumes:
        - name: config
          projected:
            defaultMode: 0440
            sources:
              {{- include "finery.configSources" (merge (dict "root" .root "token" true "store" true "catalogue" true) (.sources | default dict)) | nindent 14 }}
        {{- include "finery.modelsVolume" .root | nindent 8 }}
        - name: state
          {{- include "finery.scratch" .values.scratch | nindent 10 }}
        - name: tmp
          emptyDir: {}
---
apiVersion: v1
kind: Service
metadata:
  name: {{ $name }}
  labels:
    {{- include "finery.labels" . | nindent 4 }}
spec:
  selector:
    {{- include "finery.selectorLabels" . | nindent 4 }}
  ports:
    - {name: grpc, port: 9000, targetPort: grpc, appProtocol: kubernetes.io/h2c}
{{- if not .single }}
---
{{ include "finery.budget" (dict "root" .root "component" .component "name" $name) }}
{{- end }}
{{- if $scaled }}
---
{{ include (ternary "finery.queueScaledObject" "finery.queueAutoscaler" (eq "true" (include "finery.usesKeda" .root))) . }}
{{- end }}
{{- end -}}

{{/* "true" where a pool is scaled, by KEDA: of external metrics a cluster takes one server, so that no adapter for Prometheus can be there as well. */}}
{{- define "finery.usesKeda" -}}
{{- $uses := false -}}
{{- range .Values.serving.pools }}{{ if (.autoscaling | default dict).enabled }}{{ $uses = true }}{{ end }}{{ end -}}
{{- if $uses }}true{{ end -}}
{{- end -}}

{{/* {root, component, values}: more replicas for more queued jobs, by an adapter for Prometheus. */}}
{{- define "finery.queueAutoscaler" -}}
{{- $name := printf "%s-%s" (include "finery.fullname" .root) .component -}}
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ $name }}
  labels:
    {{- include "finery.labels" . | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ $name }}}
  minReplicas: {{ .values.autoscaling.minReplicas }}
  maxReplicas: {{ .values.autoscaling.maxReplicas }}
  metrics:
    - type: External
      external:
        metric:
          # Jobs by state, as every replica reads them from the database: an adapter for Prometheus must take their max.
          name: finery_{{ .component }}_jobs
          selector:
            matchLabels: {state: QUEUED}
        target:
          type: AverageValue
          averageValue: {{ .values.autoscaling.queuedPerReplica | quote }}
  behavior:
    scaleDown:
      stabilizationWindowSeconds: 300
{{- end -}}

{{/* {root, component, values}: the same by KEDA. */}}
{{- define "finery.queueScaledObject" -}}
{{- $name := printf "%s-%s" (include "finery.fullname" .root) .component -}}
apiVersion: keda.sh/v1alpha1
kind: ScaledObject
metadata:
  name: {{ $name }}
  labels:
    {{- include "finery.labels" . | nindent 4 }}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: {{ $name }}}
  minReplicaCount: {{ .values.autoscaling.minReplicas }}
  maxReplicaCount: {{ .values.autoscaling.maxReplicas }}
  pollingInterval: 15
  advanced:
    horizontalPodAutoscalerConfig:
      behavior:
        scaleDown:
          stabilizationWindowSeconds: 300
  triggers:
    - type: prometheus
      metricType: AverageValue
      metadata:
        serverAddress: {{ .root.Values.monitoring.prometheusUrl }}
        query: max(finery_{{ .component }}_jobs{namespace="{{ .root.Release.Namespace }}",pod=~"{{ $name }}-.+",state="QUEUED"})
        threshold: {{ .values.autoscaling.queuedPerReplica | quote }}
{{- end -}}

{{/* {root, component, name, labels?, selectorLabels?}: at most one pod is evicted at a time, of the component's with `labels`, or of those that `selectorLabels` select. */}}
{{- define "finery.budget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ .name }}
  labels:
    {{- include "finery.labels" . | nindent 4 }}
spec:
  maxUnavailable: 1
  # One that is not ready, such as a vLLM that never loads, serves nobody and may go whenever a node is drained.
  unhealthyPodEvictionPolicy: AlwaysAllow
  selector:
    matchLabels:
      {{- if .selectorLabels }}
      {{- .selectorLabels | nindent 6 }}
      {{- else }}
      {{- include "finery.selectorLabels" . | nindent 6 }}
      {{- with .labels }}
      {{- toYaml . | nindent 6 }}
      {{- end }}
      {{- end }}
{{- end -}}
