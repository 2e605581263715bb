{{/* The pod that fills the cache. */}}
{{- define "finery.baseWeightsPod" -}}
{{- $name := include "finery.fullname" . -}}
{{- $models := .Values.baseModels -}}
{{- $job := $models.job -}}
metadata:
  labels:
    {{- include "finery.selectorLabels" (dict "root" . "component" "base-weights") | nindent 4 }}
spec:
  serviceAccountName: {{ $name }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  # A pod that failed stays, and its log with it.
  restartPolicy: Never
  securityContext:
    {{- include "finery.podSecurity" . | nindent 4 }}
  {{- include "finery.pullSecrets" . | nindent 2 }}
  {{- include "finery.scheduling" (dict "values" $job) | nindent 2 }}
  containers:
    - name: base-weights
      image: {{ include "finery.image" (dict "root" . "image" .Values.dataprep.image) }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      command: [python, -m, finery_common.base_weights, fill, /etc/finery/sources.yaml, /models]
      securityContext:
        {{- include "finery.containerSecurity" . | nindent 8 }}
      env:
        {{- include "finery.env.base" . | nindent 8 }}
        {{- include "finery.env.store" . | nindent 8 }}
        {{- with $models.hubTokenSecret.name }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef: {name: {{ . }}, key: {{ $models.hubTokenSecret.key }}}
        {{- end }}
        {{- with $job.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      resources:
        {{- toYaml $job.resources | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/finery, readOnly: true}
        - {name: models, mountPath: /models}
        - {name: state, mountPath: /var/lib/finery}
        - {name: tmp, mountPath: /tmp}
  volumes:
    - name: config
      projected:
        defaultMode: 0440
        sources:
          {{- include "finery.configSources" (dict "root" . "store" true "sources" true) | nindent 10 }}
    {{- include "finery.modelsVolume" . | nindent 4 }}
    - name: state
      emptyDir: {}
    - name: tmp
      emptyDir: {}
{{- end -}}
