{{/*
The pod template of a Ray node; takes (dict "root" $ "name" POOL "pool" VALUES).
KubeRay adds the start command, the readiness probe, the token, and labels of its own.
*/}}
{{- define "steadyhelm.pod" -}}
{{- $root := .root }}
{{- $pool := .pool }}
{{- $head := eq .name "head" }}
metadata:
  labels:
    app.kubernetes.io/instance: {{ $root.Release.Name | quote }}
    app.kubernetes.io/component: {{ .name }}
    app.kubernetes.io/part-of: steadyhelm
    {{- with $root.Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- with $pool.annotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "steadyhelm.name" $root }}-{{ ternary "head" "worker" $head }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ $pool.gracePeriodSeconds }}
  securityContext: {{- include "steadyhelm.podSecurity" $root | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . | quote }}
    {{- end }}
  {{- end }}
  {{- with $pool.runtimeClassName }}
  runtimeClassName: {{ . | quote }}
  {{- end }}
  {{- with include "steadyhelm.placement" $pool | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- with $pool.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" $head }}
      image: {{ include "steadyhelm.image" (dict "root" $root "image" $pool.image) | quote }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext: {{- include "steadyhelm.containerSecurity" $root | nindent 8 }}
      env: {{- include "steadyhelm.env" . | trim | nindent 8 }}
      ports:
        {{- if $head }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: run-status, containerPort: 8266}
        - {name: run-metrics, containerPort: 9464}
        {{- end }}
        - {name: metrics, containerPort: 8080}
      resources:
        requests:
          cpu: {{ $pool.cpu | quote }}
          memory: {{ $pool.memory }}
        limits:
          memory: {{ $pool.memory }}
          {{- if $pool.gpus }}
          {{ $root.Values.gpuResource }}: {{ $pool.gpus }}
          {{- end }}
      {{- if $pool.deadAfterSeconds }}
      livenessProbe:
        httpGet: {path: /api/healthz, port: 52365}
        initialDelaySeconds: 30
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: {{ div (add $pool.deadAfterSeconds 4) 5 }}
      {{- end }}
      {{- if $head }}
      lifecycle:
        preStop:
          exec:
            command: ["/bin/bash", "-c", {{ $root.Files.Get "files/stop-drivers.sh" | toJson }}]
      {{- end }}
      volumeMounts:
        - {name: scratch, mountPath: /tmp}
        - {name: shared-mem, mountPath: /dev/shm}
        {{- if $head }}
        - {name: ray-logs, mountPath: /tmp/ray}
        {{- end }}
        {{- if include "steadyhelm.credentialsSecret" $root }}
        - {name: s3-credentials, mountPath: /var/run/secrets/steadyhelm/s3, readOnly: true}
        {{- end }}
        {{- range $index, $path := keys $pool.mounts | sortAlpha }}
        {{- with index $pool.mounts $path }}
        - name: mount-{{ $index }}
          mountPath: {{ $path }}
          {{- with .subPath }}
          subPath: {{ . | quote }}
          {{- end }}
          readOnly: {{ .readOnly | default false }}
        {{- end }}
        {{- end }}
  volumes:
    - name: scratch
      emptyDir: {sizeLimit: {{ $pool.scratch }}}
    - name: shared-mem
      emptyDir: {medium: Memory, sizeLimit: {{ $pool.shm }}}
    {{- if $head }}
    - name: ray-logs
      emptyDir: {sizeLimit: {{ $pool.scratch }}}
    {{- if $root.Values.autoscaling.enabled }}
    # For the autoscaler's container alone: code of runs must not be able to patch pods.
    - name: kubernetes-api
      projected:
        sources:
          - serviceAccountToken: {path: token, expirationSeconds: 3607}
          - configMap:
              name: kube-root-ca.crt
              items: [{key: ca.crt, path: ca.crt}]
          - downwardAPI:
              items: [{path: namespace, fieldRef: {fieldPath: metadata.namespace}}]
    {{- end }}
    {{- end }}
    {{- with include "steadyhelm.credentialsSecret" $root }}
    - name: s3-credentials
      secret:
        secretName: {{ . | quote }}
        items: [{key: credentials, path: credentials}]
    {{- end }}
    {{- range $index, $path := keys $pool.mounts | sortAlpha }}
    {{- with index $pool.mounts $path }}
    - name: mount-{{ $index }}
      {{- if .claim }}
      persistentVolumeClaim: {claimName: {{ .claim | quote }}}
      {{- else if .configMap }}
      configMap: {name: {{ .configMap | quote }}}
      {{- else }}
      secret: {secretName: {{ .secret | quote }}}
      {{- end }}
    {{- end }}
    {{- end }}
{{- end }}

{{/* Which nodes a pod may go to, and ahead of whom; takes a pool's values. */}}
{{- define "steadyhelm.placement" -}}
{{- with .priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The environment of a Ray node, the pool's own over the chart's; takes what steadyhelm.pod takes. */}}
{{- define "steadyhelm.env" -}}
{{- $grace := int .pool.gracePeriodSeconds }}
{{- $env := dict
  "HOME" "/tmp"
  "RAY_USAGE_STATS_ENABLED" "0"
  "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" (max 1 (sub $grace 10) | toString)
  "STEADYHELM_POOL" .name
}}
{{- with include "steadyhelm.store" .root }}
{{- $_ := set $env "STEADYHELM_STORE_URI" . }}
{{- end }}
{{- if include "steadyhelm.credentialsSecret" .root }}
{{- $_ := set $env "AWS_SHARED_CREDENTIALS_FILE" "/var/run/secrets/steadyhelm/s3/credentials" }}
{{- end }}
{{- if ne .root.Values.auth.mode "token" }}
{{- $_ := set $env "RAY_AUTH_MODE" "disabled" }}
{{- end }}
{{- if eq .name "head" }}
{{- $_ := set $env "RAY_JOB_STOP_WAIT_TIME_S" (max 3 (sub $grace 20) | toString) }}
{{- /* The hook has stopped the drivers; nothing is left to move elsewhere. */}}
{{- $_ := set $env "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S" "0" }}
{{- $_ := set $env "STEADYHELM_METRICS_ADDRESS" "0.0.0.0:9464" }}
{{- $_ := set $env "STEADYHELM_STATUS_ADDRESS" "0.0.0.0:8266" }}
{{- end }}
{{- range $name, $value := mergeOverwrite $env .pool.env }}
- name: {{ $name | quote }}
  value: {{ $value | toJson }}
{{- end }}
{{- end }}
