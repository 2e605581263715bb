{{- define "finery.catalogue" -}}
models:
{{- range .Values.baseModels.models }}
  - name: {{ .name }}
    path: /models/{{ .name }}
    max_sequence_length: {{ int .maxSequenceLength }}
{{- end }}
{{- end -}}

{{- define "finery.sources" -}}
models:
{{- range .Values.baseModels.models }}
  - name: {{ .name }}
    {{- with .hubId }}
    hub_id: {{ . }}
    {{- end }}
    {{- with .s3Prefix }}
    s3_prefix: {{ . }}
    {{- end }}
    {{- with .sha256 }}
    sha256: {{ . | quote }}
    {{- end }}
{{- end }}
{{- end -}}
