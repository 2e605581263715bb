{{/*
What a training job's attempt becomes. The trainer fills in the name, the labels of job and attempt, the annotation with the attempt's
token, the number of GPUs, and suspends it where a queue is named.
*/}}
{{- define "finery.workerJob" -}}
{{- $name := include "finery.fullname" . -}}
{{- $worker := .Values.trainer.worker -}}
{{- $count := dig "gpu" "count" 1 $worker -}}
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ $name }}-worker
  namespace: {{ .Release.Namespace }}
  labels:
    {{- include "finery.selectorLabels" (dict "root" . "component" "worker") | nindent 4 }}
    {{- with $worker.queueName }}
    kueue.x-k8s.io/queue-name: {{ . }}
    {{- end }}
spec:
  completions: 1
  parallelism: 1
  # Another attempt is the trainer's to make: it has a new token, and the old one is refused.
  backoffLimit: 0
  podReplacementPolicy: Failed
  ttlSecondsAfterFinished: {{ int $worker.ttlSecondsAfterFinished }}
  podFailurePolicy:
    rules:
      # A pod that is evicted, preempted or drained away: the trainer starts another attempt from the last checkpoint.
      - action: FailJob
        onPodConditions:
          - {type: DisruptionTarget, status: "True"}
      # 75: told to stop, state saved. Whatever else: the attempt is lost, and the trainer says whether there is another.
      - action: FailJob
        onExitCodes: {containerName: worker, operator: NotIn, values: [0]}
  template:
    metadata:
      {{- include "finery.podMetadata" (dict "root" . "component" "worker" "values" $worker) | nindent 6 }}
    spec:
      serviceAccountName: {{ $name }}
      automountServiceAccountToken: false
      # Process 1 is the sandbox then, which reaps what a killed process leaves behind.
      shareProcessNamespace: true
      enableServiceLinks: false
      restartPolicy: Never
      # A worker that is told to end saves its state first.
      terminationGracePeriodSeconds: {{ int $worker.terminationGracePeriodSeconds }}
      securityContext:
        {{- include "finery.podSecurity" . | nindent 8 }}
      {{- include "finery.pullSecrets" . | nindent 6 }}
      {{- include "finery.scheduling" (dict "values" $worker "gpu" $worker.gpu) | nindent 6 }}
      containers:
        - name: worker
          image: {{ include "finery.image" (dict "root" . "image" (ternary .Values.trainer.image $worker.image (empty $worker.image.repository))) }}
          imagePullPolicy: {{ .Values.image.pullPolicy }}
          command: [python, -m, finery_trainer.worker]
          securityContext:
            {{- include "finery.containerSecurity" . | nindent 12 }}
          env:
            {{- include "finery.env.base" . | nindent 12 }}
            {{- include "finery.env.store" . | nindent 12 }}
            {{- include "finery.env.catalogue" . | nindent 12 }}
            - name: FINERY_TRAINER_ADDRESS
              value: {{ $name }}-trainer:9000
            - name: FINERY_WORKER_TOKEN_FILE
              value: /run/finery/token
            - name: FINERY_WORKER_TOLERANCE_S
              value: {{ $worker.toleranceSeconds | quote }}
            {{- if and (eq (int $count) 0) (empty $worker.gpu.resourceClaims) }}
            {{- include "finery.env.noGpu" . | nindent 12 }}
            {{- end }}
            # The cache may still be being filled.
            - name: FINERY_WORKER_BASE_WAIT_S
              value: "7200"
            - name: OMP_WAIT_POLICY
              value: PASSIVE
            {{- with $worker.extraEnv }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: metrics, containerPort: 9100}
          resources:
            {{- include "finery.resources" (dict "resources" $worker.resources "gpu" $worker.gpu "count" $count) | nindent 12 }}
          volumeMounts:
            - {name: config, mountPath: /etc/finery, readOnly: true}
            - {name: token, mountPath: /run/finery, readOnly: true}
            - {name: models, mountPath: /models, readOnly: true}
            - {name: state, mountPath: /var/lib/finery}
            - {name: tmp, mountPath: /tmp}
            - {name: shm, mountPath: /dev/shm}
      volumes:
        - name: config
          projected:
            defaultMode: 0440
            sources:
              {{- include "finery.configSources" (dict "root" . "store" true "catalogue" true) | nindent 14 }}
        - name: token
          downwardAPI:
            defaultMode: 0440
            items:
              - path: token
                fieldRef: {fieldPath: "metadata.annotations['finery.dev/worker-token']"}
        {{- include "finery.modelsVolume" . | nindent 8 }}
        - name: state
          {{- include "finery.scratch" $worker.scratch | nindent 10 }}
        - name: tmp
          emptyDir: {}
        - name: shm
          emptyDir: {medium: Memory, sizeLimit: {{ $worker.shmSize }}}
{{- end -}}
