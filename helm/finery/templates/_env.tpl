{{/* Environments. Secrets come as files below /etc/finery, but for the database's URL, which the settings take from a variable only. */}}

{{/* {root, port}: what every process is told. */}}
{{- define "finery.env.base" -}}
- name: HOME
  value: /var/lib/finery
- name: FINERY_STATE_DIR
  value: /var/lib/finery
- name: FINERY_METRICS_HOST
  value: 0.0.0.0
- name: FINERY_METRICS_PORT
  value: "9100"
- name: FINERY_LOG_LEVEL
  value: {{ .Values.log.level }}
{{- with .Values.monitoring.otlpEndpoint }}
- name: FINERY_OTLP_ENDPOINT
  value: {{ . | quote }}
{{- end }}
{{- if (.Values.trustedCa | default dict).existingSecret }}
# In place of the public authorities: Python and the S3 client go by the one, gRPC by the other.
- name: SSL_CERT_FILE
  value: /etc/finery/trusted-ca.crt
- name: GRPC_DEFAULT_SSL_ROOTS_FILE_PATH
  value: /etc/finery/trusted-ca.crt
{{- end }}
{{- end -}}

{{- define "finery.env.store" -}}
{{- $external := eq .Values.objectStore.kind "external" -}}
- name: FINERY_S3_ENDPOINT
  value: {{ include "finery.storeEndpoint" . }}
- name: FINERY_S3_BUCKET
  value: {{ .Values.objectStore.bucket }}
- name: FINERY_S3_REGION
  value: {{ .Values.objectStore.region }}
- name: FINERY_S3_SECURE
  value: {{ and $external .Values.objectStore.external.secure | quote }}
- name: FINERY_S3_ACCESS_KEY_FILE
  value: /etc/finery/s3-access-key
- name: FINERY_S3_SECRET_KEY_FILE
  value: /etc/finery/s3-secret-key
{{- end -}}

{{- define "finery.env.catalogue" -}}
- name: FINERY_CATALOGUE
  value: /etc/finery/catalogue.yaml
{{- end -}}

{{- define "finery.env.service" -}}
{{ include "finery.env.base" . }}
{{ include "finery.env.store" . }}
- name: FINERY_TOKEN_SECRET_FILE
  value: /etc/finery/token-secret
- name: FINERY_DATABASE_URL
  valueFrom:
    secretKeyRef:
      name: {{ include "finery.databaseSecretName" . }}
      key: {{ ternary .Values.postgres.external.urlKey "url" (eq .Values.postgres.kind "external") }}
{{- end -}}

{{/* For a pod that asked for no GPU, of an image that would take all of them where NVIDIA's runtime is the node's own. */}}
{{- define "finery.env.noGpu" -}}
- name: NVIDIA_VISIBLE_DEVICES
  value: void
{{- end -}}

{{/* Where the inner services are, for the gateway. It wants all of them: without a pool, serving's answers 503 as one that is down. */}}
{{- define "finery.env.addresses" -}}
{{- $name := include "finery.fullname" . -}}
{{- range list "dataprep" "trainer" "converter" }}
- name: FINERY_{{ upper . }}_ADDRESS
  value: {{ $name }}-{{ . }}:9000
{{- end }}
- name: FINERY_SERVING_ADDRESS
  value: {{ include "finery.servingTarget" . }}
{{- end -}}

{{/* Every agent, by the headless service's addresses: callers go round them. */}}
{{- define "finery.servingTarget" -}}
dns:///{{ include "finery.fullname" . }}-serving:9000
{{- end -}}

{{/* Where the converter pushes to, and the tokens that it may use. */}}
{{- define "finery.env.hub" -}}
{{- with .Values.converter.hub -}}
- name: FINERY_HUB_ENDPOINT
  value: {{ .endpoint | default "https://huggingface.co" | quote }}
{{- if .tokens }}
- name: FINERY_HUB_TOKENS_DIR
  value: /etc/finery/hub-tokens
{{- end }}
{{- end }}
{{- end -}}

{{/*
{root, token?, store?, catalogue?, sources?, jobTemplate?, vllmCa?, vllmKey?, hubTokens?}: the sources of the volume that is mounted at
/etc/finery.
*/}}
{{- define "finery.configSources" -}}
{{- $minio := ne .root.Values.objectStore.kind "external" -}}
{{- $external := .root.Values.objectStore.external -}}
{{- with (.root.Values.trustedCa | default dict).existingSecret }}
- secret:
    name: {{ . }}
    items: [{key: {{ $.root.Values.trustedCa.key }}, path: trusted-ca.crt}]
{{- end }}
{{- if .token }}
- secret:
    name: {{ include "finery.tokenSecretName" .root }}
    items: [{key: {{ .root.Values.tokenSecret.key }}, path: token-secret}]
{{- end }}
{{- if .store }}
- secret:
    name: {{ include "finery.storeSecretName" .root }}
    items:
      - {key: {{ ternary "access-key" $external.accessKeyKey $minio }}, path: s3-access-key}
      - {key: {{ ternary "secret-key" $external.secretKeyKey $minio }}, path: s3-secret-key}
{{- end }}
{{- if .catalogue }}
- configMap:
    name: {{ include "finery.fullname" .root }}-catalogue
    items: [{key: catalogue.yaml, path: catalogue.yaml}]
{{- end }}
{{- if .sources }}
- configMap:
    name: {{ include "finery.fullname" .root }}-catalogue
    items: [{key: sources.yaml, path: sources.yaml}]
{{- end }}
{{- if .jobTemplate }}
- configMap:
    name: {{ include "finery.fullname" .root }}-worker-job
    items: [{key: worker-job.yaml, path: worker-job.yaml}]
{{- end }}
{{- if .vllmCa }}
- secret:
    name: {{ include "finery.vllmTlsSecretName" .root }}
    items: [{key: ca.crt, path: vllm-ca.crt}]
{{- end }}
{{- if .vllmKey }}
- secret:
    name: {{ include "finery.vllmTlsSecretName" .root }}
    items: [{key: tls.crt, path: vllm-tls.crt}, {key: tls.key, path: vllm-tls.key}]
{{- end }}
{{- range .hubTokens }}
- secret:
    name: {{ .existingSecret }}
    items: [{key: {{ .key | default "token" }}, path: hub-tokens/{{ .project | default "default" }}/{{ .name | default "default" }}}]
{{- end }}
{{- end -}}
