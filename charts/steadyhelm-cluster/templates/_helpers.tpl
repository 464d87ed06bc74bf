{{/* Name of the RayCluster, which all other names begin with. */}}
{{- define "steadyhelm.name" -}}
{{ .Values.name | default .Release.Name }}
{{- end }}

{{/* Labels of every object of the chart. */}}
{{- define "steadyhelm.labels" -}}
app.kubernetes.io/name: steadyhelm
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: steadyhelm
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Labels of a pod that is not Ray's, which select it too; takes (dict "root" $ "component" NAME). */}}
{{- define "steadyhelm.own" -}}
app.kubernetes.io/name: steadyhelm
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Reference of the image NAME; takes (dict "root" $ "image" NAME). */}}
{{- define "steadyhelm.image" -}}
{{- if regexMatch "[:@]" (base .image) -}}
{{ .image }}
{{- else -}}
{{- with .root.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ .image }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}
{{- end }}

{{/* The Secret with the Ray API's token, under auth_token. */}}
{{- define "steadyhelm.tokenSecret" -}}
{{ .Values.auth.secretName | default (include "steadyhelm.name" .) }}
{{- end }}

{{/* The store of runs; empty where none is known. */}}
{{- define "steadyhelm.store" -}}
{{- if .Values.s3.embedded.enabled -}}
s3://steadyhelm/runs?endpoint=http://{{ include "steadyhelm.name" . }}-s3.{{ .Release.Namespace }}.svc:7070
{{- else -}}
{{ .Values.s3.uri }}
{{- end }}
{{- end }}

{{/* The Secret with an AWS credentials file, under credentials; empty leaves them to workload identity. */}}
{{- define "steadyhelm.credentialsSecret" -}}
{{- if .Values.s3.embedded.enabled }}{{ include "steadyhelm.name" . }}-s3{{ else }}{{ .Values.s3.credentialsSecret }}{{ end }}
{{- end }}

{{/* What Pod Security "restricted" asks of a pod. */}}
{{- define "steadyhelm.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.uid }}
runAsGroup: {{ int64 .Values.uid }}
fsGroup: {{ int64 .Values.uid }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{/* What it asks of a container, and a root file system that nobody writes to. */}}
{{- define "steadyhelm.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Ends the rendering with every contradiction between values that the schema cannot see. */}}
{{- define "steadyhelm.validate" -}}
{{- $wrong := list }}
{{- if not (regexMatch "^[a-z]([a-z0-9-]{0,51}[a-z0-9])?$" (include "steadyhelm.name" .)) }}
{{- $wrong = append $wrong (printf "name %q must begin with a letter, have at most 53 lower-case letters, digits and dashes, and end without a dash: set name, or rename the release" (include "steadyhelm.name" .)) }}
{{- end }}
{{- range $path, $pool := dict "pools.rollout" .Values.pools.rollout "pools.rollout.spot" .Values.pools.rollout.spot "pools.reward" .Values.pools.reward }}
{{- if gt (int $pool.min) (int $pool.max) }}
{{- $wrong = append $wrong (printf "%s.min is %d, but %s.max is %d: lower the former or raise the latter" $path (int $pool.min) $path (int $pool.max)) }}
{{- end }}
{{- end }}
{{- if and .Values.s3.embedded.enabled (or .Values.s3.uri .Values.s3.credentialsSecret) }}
{{- $wrong = append $wrong "s3.embedded.enabled brings a store of its own: leave s3.uri and s3.credentialsSecret empty, or turn it off" }}
{{- end }}
{{- if and .Values.kueue.queue .Values.autoscaling.enabled (not .Values.kueue.elastic) }}
{{- $wrong = append $wrong "kueue.queue is set, and Kueue refuses clusters that scale themselves: turn autoscaling.enabled off, or kueue.elastic on where Kueue has ElasticJobsViaWorkloadSlices" }}
{{- end }}
{{- if $wrong }}
{{- fail (join "\n" $wrong) }}
{{- end }}
{{- end }}
